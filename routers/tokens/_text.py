"""The base class of routers that choose by the text of a row, and readers of example texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from loraweave.common.chat import Prompt
from loraweave.common.checks import is_list, one_or_many, says_something
from loraweave.common.names import unknown_expert
from loraweave.common.rows import located, read_row
from loraweave.errors import InvalidTask, ScopeError, WeightingError
from loraweave.hub.embedders._embedder import Embedder, embedder_of
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.hub.search.keys import MAX_SAMPLE_INPUTS
from loraweave.routers.tokens._caches import BesideCache
from loraweave.routers.tokens._call import (
    CallText,
    SeenTokens,
    asked_of_head,
    count_copies,
    count_rows,
    current_prompts,
    current_tokenizer,
    has_two_sequences,
)
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._router import TokenRouter, option_names
from loraweave.routers.tokens._scores import without
from loraweave.types import Task

# the most texts whose vectors are kept, since each generated token needs its prompt's vector again
NUM_KEPT = 4096


class TextRouter(TokenRouter):
    """A router that weighs experts by the embedding of a text; each row of a batch has the weights of its own text.

    A row's text is its prompt where that is known: in `generate`, and where losses and labels are scored. In any other call
    it is the whole row, and under a cache the row of the call that began it. The model's Composer needs a tokenizer. Weights
    sum to 1 over the experts. In a layer that an expert does not update its weight is 0 and the other weights are not
    rescaled, so that a router that chooses one adapter acts as that adapter alone. A subclass computes weights from vectors.
    """

    simplex: bool = False
    needs_tokenizer: ClassVar[bool] = True
    # buffers with a row for each expert
    by_expert: ClassVar[tuple[str, ...]] = ()
    # whether all tokens of a row share its weights
    per: Literal["row", "token"] = "row"
    # with weights per token: the number of tokens after which the context is embedded again
    refresh: int = 1

    embedder_id_: Tensor

    def __init__(self, pool: ExpertPool | Members, embedder: str) -> None:
        super().__init__(pool)
        self.embedder = embedder
        self._kept: dict[str, Tensor] = {}
        self._beside: BesideCache[SeenTokens] = BesideCache(self.name)
        self.register_buffer("embedder_id_", torch.empty(0, dtype=torch.uint8))

    @cached_property
    def _embedder(self) -> Embedder:
        return embedder_of(self.embedder)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, without the texts, which the router's tensors were made from."""
        return {name: getattr(self, name) for name in option_names(type(self)) if name in vars(self)}

    def weights_of(self, vectors_ND: Tensor) -> Tensor:
        """Return w_NE in fp32 for texts with these vectors (float64, of norm 1); rows sum to 1."""
        raise NotImplementedError

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return w_NE in fp32 for texts. Raises WeightingError before `fit`, or if the embedder has changed since."""
        self.require_embedder()
        return self.weights_of(self.vectors(texts))

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D) of texts in float64, on the device of the router's own tensors."""
        known = {text: self._kept[text] for text in dict.fromkeys(texts) if text in self._kept}
        if missing := [text for text in dict.fromkeys(texts) if text not in known]:
            rows_ND = np.asarray(self._embedder.embed(missing), dtype=np.float64)
            made = dict(zip(missing, torch.from_numpy(rows_ND), strict=True))
            known |= made
            # another thread may have looked at the old one, which stays as it is
            self._kept = made if len(self._kept) + len(made) > NUM_KEPT else self._kept | made
        return torch.stack([known[text] for text in texts]).to(self.embedder_id_.device)

    def remember_embedder(self) -> None:
        """Store the id of the embedder that made all kept vectors."""
        self.embedder_id_ = torch.tensor(list(self._embedder.id.encode()), dtype=torch.uint8)

    def require_embedder(self) -> None:
        """Raise WeightingError if the router has no texts yet, or if the embedder has changed since it read them."""
        made_by = bytes(self.embedder_id_.tolist()).decode()
        if not made_by:
            raise WeightingError(f"router {self.name!r} knows no text of its experts yet: fit() it first")
        if made_by != (embedder_id := self._embedder.id):
            raise WeightingError(
                f"what router {self.name!r} knows of texts was made by the embedder {made_by!r}, but {self.embedder!r} is "
                f"now {embedder_id!r}: make the router again with this one"
            )

    def require_of_each(self, by_name: Mapping[str, Any], what: str, names: tuple[str, ...] | None = None) -> None:
        """Raise UnknownExpert for a key of `by_name` that is not an expert, WeightingError for experts without an entry.

        `by_name` is {expert: entries}, and `what` is a noun for the entries in messages. `names` replaces the router's
        experts.
        """
        names = names or self.experts
        for name in by_name:
            if name not in names:
                raise unknown_expert(name, names)
        if missing := [name for name in names if not by_name.get(name)]:
            raise WeightingError(
                f"router {self.name!r} needs {what} of every expert, and has none of {', '.join(map(repr, missing))}: give "
                "some, or make the router for pool.subset(...) without these"
            )

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        raise ScopeError(
            f"router {self.name!r} reads texts, not the input of layer {layer!r}: activate() it in a Composer, whose "
            "calls begin with it, or ask of_texts()"
        )

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> TextWeights:
        """Return a call's weights. Raises ScopeError for unknown text: embeddings alone, or a cache filled elsewhere."""
        self.require_embedder()
        with torch.inference_mode(False), torch.no_grad():
            per_row = self.per == "row"
            w_BTE = self._per_row(arguments) if per_row else self._per_token(model, arguments)
        return TextWeights(w_BTE, self.members, arguments.get("logits_to_keep"))

    def _per_row(self, arguments: Mapping[str, Any]) -> Tensor:
        prompts = current_prompts()
        if prompts is not None:
            # each token that is generated asks again
            if self not in prompts.weights:
                prompts.weights[self] = self._of_tokens(prompts.rows).to(prompts.ids_BT.device)[:, None]
            copies = count_copies(self.name, prompts, count_rows(arguments))
            return prompts.weights[self].repeat_interleave(copies, dim=0)
        text = CallText.of(self.name, self._beside, arguments)
        return self._of_tokens(text.rows()).to(text.ids_BT.device)[:, None]

    def _per_token(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        if has_two_sequences(model):
            raise ScopeError(
                f"router {self.name!r} gives each token the weights of what stands before it, and an encoder reads a text "
                "as a whole: make the router with per='row'"
            )
        text = CallText.of(self.name, self._beside, arguments)
        contexts, real_BT = text.contexts(self.name, self.refresh)
        w_NE = self._of_tokens(contexts)
        w_BTE = w_NE.new_zeros(*real_BT.shape, len(self.experts))
        w_BTE[real_BT.to(w_NE.device)] = w_NE
        return w_BTE.to(text.ids_BT.device)

    def _of_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return w_NE for N texts, given as token ids. Raises ScopeError without a tokenizer."""
        tokenizer = current_tokenizer()
        if tokenizer is None:
            raise ScopeError(
                f"router {self.name!r} reads text, and has no tokenizer to turn token ids into it: make the Composer with "
                "tokenizer=..."
            )
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        if not texts:
            return torch.zeros(0, len(self.experts))
        return self.weights_of(self.vectors(texts))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # as many as the router was made from, which is known from the file alone
        for name in self._buffers:
            if (tensor := state_dict.get(prefix + name)) is not None:
                self._buffers[name] = tensor.clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        problems: list[str] = rest[-1]
        counts = {name: len(self.get_buffer(name)) for name in self.by_expert}
        problems += [
            f"{name} has {count} rows, but there are {len(self.experts)} experts"
            for name, count in counts.items()
            if count not in (0, len(self.experts))
        ]


class TextWeights:
    """The weights w_BTE of a call with the argument `logits_to_keep`; 0 for an expert in layers that it does not update."""

    def __init__(self, w_BTE: Tensor, members: Members, logits_to_keep: int | Tensor | None) -> None:
        self._w_BTE = w_BTE
        self._members = members
        self._logits_to_keep = logits_to_keep

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        w_BTE = asked_of_head(self._w_BTE, x_BTI.shape[1], self._logits_to_keep)
        return without(w_BTE, self._members.layers[layer].experts, filling=0.0)


Examples = Mapping[str, Iterable[str]] | Hub | None


def read_expert_texts(router: str, pool: ExpertPool, examples: Examples, template: str | None) -> dict[str, list[str]]:
    """Return {expert: texts} for the experts that have some.

    Texts in `examples` are taken as they are. From a Hub, or from the adapters' cards if None, up to 50 sample inputs of
    each expert become prompts by `template`, with the description as the instruction; without a template they stay as they
    are. Raises WeightingError, naming `router`, for anything but lists of texts.
    """
    if isinstance(examples, Mapping):
        return {name: _require_texts(router, name, texts) for name, texts in examples.items()}
    expert_texts = {}
    for name in pool.names:
        if isinstance(examples, Hub):
            record = examples.record(name)
            inputs, description = record.examples, record.description
        else:
            card = pool.adapters[name].card
            inputs, description = tuple(card.get("examples") or ()), str(card.get("description") or "")
        samples = [text for text in inputs if says_something(text)][:MAX_SAMPLE_INPUTS]
        if template is not None:
            task = Task([], instruction=description, template=template)
            samples = [str(task.prompt(text)) for text in samples]
        expert_texts[name] = samples
    return expert_texts


def _require_texts(router: str, name: str, texts: Any) -> list[str]:
    listed = list(one_or_many(texts))
    if odd := [text for text in listed if not says_something(text)]:
        raise WeightingError(
            f"an example of {name!r} for router {router!r} is {odd[0]!r}, which says nothing: examples are texts, as the "
            "model will be asked"
        )
    return listed


def read_prompts(dataset: Any) -> dict[str, list[Prompt]]:
    """Return {name: prompts} of {name: texts}, or of data for `labelled_tasks`, whose errors are raised."""
    if isinstance(dataset, Mapping) and dataset and all(is_list(texts, of=str) for texts in dataset.values()):
        return {name: list(texts) for name, texts in dataset.items()}
    return {name: [task.prompt(text) for text, _ in task.examples] for name, task in labelled_tasks(dataset).items()}


def labelled_tasks(dataset: Any) -> dict[str, Task]:
    """Return {name: task} of {name: Task or rows}, or of rows that each name their 'expert'.

    Rows are of any form of `loraweave.common.rows`, with an instruction of their own if any; a "prompt" is the whole prompt.
    Raises InvalidTask for rows of another form, for rows that name no expert and for names without any.
    """
    if isinstance(dataset, Mapping):
        tasks = {
            name: rows_or_task if isinstance(rows_or_task, Task) else _read_task(located(rows_or_task, of=repr(name)))
            for name, rows_or_task in dataset.items()
        }
    else:
        tasks = {name: _read_task(rows) for name, rows in _group_by_expert(dataset).items()}
    if not tasks:
        raise InvalidTask("the data set is empty: give {name: [(input, target), ...]}")
    for name, task in tasks.items():
        if not task.examples:
            raise InvalidTask(f"the data set has no examples of {name!r}: give some, or leave the name out")
    return tasks


def _read_task(rows: Iterable[tuple[str, Any]]) -> Task:
    """Make a task of (name for messages, row) pairs; its prompts are the inputs."""
    plain = Task(())
    read = [read_row(row, where) for where, row in rows]
    return Task([(plain.prompt_of(row), row.targets[0]) for row in read], template="{input}")


def _group_by_expert(dataset: Any) -> dict[str, list[tuple[str, Any]]]:
    grouped: dict[str, list[tuple[str, Any]]] = {}
    for where, row in located(dataset, of="the data set"):
        if not isinstance(row, Mapping) or not row.get("expert"):
            raise InvalidTask(
                f"{where}, {row!r:.80}, names no expert, and this router learns which expert answers what: give each row an "
                "'expert', or {expert: rows}"
            )
        grouped.setdefault(row["expert"], []).append((where, row))
    return grouped
