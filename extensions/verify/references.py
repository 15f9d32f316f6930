"""The model at hand as reference: the probes that recognise an adapter, and the answers under any hypothesis.

Probes are kept in a folder by the content of what they are for, so that a server is watched without loading a model.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraweave import Adapter, AdapterUnsupported, Composer, CompositionError, ExpertPool
from loraweave.extend import text_digest, whole_file
from loraweave.extend.scoring import end_tokens, pad_id
from loraweave.extensions.verify.answers import Answer, distance, key, top_of
from loraweave.extensions.verify.fits import Transcript, Weights
from loraweave.extensions.verify.hypotheses import Hypothesis

FORMAT = 1
# tokens whose log-probabilities are kept at each place, and rows of one batch
NUM_KEPT, NUM_ROWS = 64, 8
MAX_PROMPT_TOKENS = 192


@dataclass(frozen=True)
class Probe:
    """A prompt's token ids with its answer under each likely hypothesis, the first being that the right adapter answers."""

    ids: tuple[int, ...]
    answers: dict[str, Answer]

    @property
    def asked(self) -> Answer:
        return next(iter(self.answers.values()))

    @property
    def separation(self) -> float:
        """The least distance in nats between the right answer and any other; infinite if there is no other."""
        return min((distance(other, self.asked) for other in list(self.answers.values())[1:]), default=float("inf"))


@dataclass(eq=False)
class References:
    """A source of reference answers by the model that `load` returns once needed; the folder, or None, keeps probes."""

    _load: Callable[[], tuple[Any, Any]]
    _base: str
    _folder: Path | None
    _known: dict[Any, Answer] = field(default_factory=dict)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load()

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self._loaded[0].config

    def probes(self, rows: Sequence[Hypothesis], prompts: Sequence[str], count: int, num_tokens: int) -> list[Probe]:
        """Return the `count` prompts that best tell the first hypothesis from the nearest of the others, best first."""
        said = [(row.verdict, sorted(row.sign)) for row in rows]
        path = self._path([FORMAT, self._base, said, list(prompts), count, num_tokens])
        kept = None if path is None else _read(path)
        if kept is not None:
            return kept
        tokenizer = self._loaded[1]
        read = [tuple(map(int, tokenizer(prompt)["input_ids"])) for prompt in prompts]
        ids = [tokens for tokens in dict.fromkeys(read) if 0 < len(tokens) <= MAX_PROMPT_TOKENS]
        answers = self.answers(rows, ids, num_tokens)
        named = [row.verdict for row in rows]
        candidates = [Probe(tokens, dict(zip(named, of, strict=True))) for tokens, of in zip(ids, answers, strict=True)]
        chosen = sorted(candidates, key=lambda probe: -probe.separation)[:count]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as target:
                target.write_text(json.dumps([asdict(probe) for probe in chosen]), encoding="utf-8")
        return chosen

    def fits(self, adapter: Adapter) -> bool:
        """Return True if the adapter can be used with this model."""
        try:
            Composer(self._loaded[0], [adapter])
        except (CompositionError, AdapterUnsupported):
            return False
        return True

    @torch.no_grad()
    def answers(self, rows: Sequence[Hypothesis], prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[Answer]]:
        """Return, for each prompt, the greedy answer under each hypothesis; the hypotheses are computed as rows of a batch.

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported for an adapter that is not for this model.
        """
        new = {row.sign: row for ids in prompts for row in rows if (row.sign, ids, num_tokens) not in self._known}
        adapters = {adapter.hash: adapter for row in new.values() for adapter, _ in row.parts}
        engine = Composer(self._loaded[0], ExpertPool(adapters)) if adapters else None
        for ids in prompts:
            left = [row for sign, row in new.items() if (sign, ids, num_tokens) not in self._known]
            for start in range(0, len(left), NUM_ROWS):
                batch = left[start : start + NUM_ROWS]
                with nullcontext() if engine is None else engine.activate([row.mixture for row in batch]):
                    answers = self._greedy(ids, len(batch), num_tokens)
                self._known |= {(row.sign, ids, num_tokens): answer for row, answer in zip(batch, answers, strict=True)}
        return [[self._known[row.sign, ids, num_tokens] for row in rows] for ids in prompts]

    @cached_property
    def _ids_by_key(self) -> dict[str, list[int]]:
        """The token ids of the vocabulary by their texts' keys."""
        ids: dict[str, list[int]] = {}
        for token in range(self.config.get_text_config().vocab_size):
            ids.setdefault(key(self._loaded[1].decode([token])), []).append(token)
        return ids

    def id_of(self, word: str) -> int | None:
        """Return the id of the one token that has this text; None if several have it, or none."""
        same = [token for token in self._ids_by_key.get(key(word), ()) if self._loaded[1].decode([token]) == word]
        return same[0] if len(same) == 1 else None

    @torch.no_grad()
    def predicted(
        self, adapters: Mapping[str, Adapter], transcripts: Sequence[Transcript], rows: Sequence[Weights]
    ) -> np.ndarray:
        """Return the log-probabilities of all listed tokens under each row's weights of the adapters, as [row][token].

        Of tokens with the same text the likeliest counts; NaN stands for a text that no token has.
        """
        model, values = self._loaded[0], []
        engine = Composer(model, ExpertPool({adapter.hash: adapter for adapter in adapters.values()}))
        mixtures = [{adapters[name].hash: weight for name, weight in weights.items()} or None for weights in rows]
        for batch in (mixtures[start : start + NUM_ROWS] for start in range(0, len(mixtures), NUM_ROWS)):
            columns = []
            with engine.activate(batch):
                for transcript in transcripts:
                    ids_BT = torch.tensor([[*transcript.prompt, *transcript.chosen]] * len(batch), device=model.device)
                    logits_BKV = model(ids_BT, use_cache=False).logits[:, len(transcript.prompt) - 1 :]
                    logprobs_BKV = logits_BKV.double().log_softmax(dim=-1).cpu()
                    for logprobs_BV, top in zip(logprobs_BKV.unbind(1), transcript.tops, strict=True):
                        tokens = [self._ids_by_key.get(text) for text in top]
                        columns += [
                            logprobs_BV[:, ids].amax(1) if ids else torch.full((len(batch),), torch.nan) for ids in tokens
                        ]
            values.append(torch.stack([column.double() for column in columns], dim=1).numpy())
        return np.concatenate(values)

    def _greedy(self, ids: tuple[int, ...], count: int, num_tokens: int) -> list[Answer]:
        model, tokenizer = self._loaded
        prompt_BT = torch.tensor([ids] * count, device=model.device)
        output = model.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            do_sample=False,
            num_beams=1,
            max_new_tokens=num_tokens,
            pad_token_id=pad_id(tokenizer),
            output_logits=True,
            return_dict_in_generate=True,
        )
        ends = set(end_tokens(model) or ())
        tokens_BK = output.sequences[:, len(ids) :].tolist()
        logprobs_KBV = [step.float().log_softmax(dim=-1) for step in output.logits]
        return [self._answer(row, [step[n] for step in logprobs_KBV], ends) for n, row in enumerate(tokens_BK)]

    def _answer(self, tokens: Sequence[int], logprobs_KV: Sequence[torch.Tensor], ends: set[int]) -> Answer:
        tokenizer = self._loaded[1]
        length = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
        ended = tokens[length - 1] in ends
        tops = []
        for logprobs_V in logprobs_KV[:length]:
            best = logprobs_V.topk(min(NUM_KEPT, len(logprobs_V)))
            words = [tokenizer.decode([token]) for token in best.indices.tolist()]
            tops.append(top_of(zip(words, [round(value, 6) for value in best.values.tolist()], strict=True)))
        texts = tuple(tokenizer.decode([token]) for token in tokens[:length])
        end = tokenizer.decode([min(ends)]) if ends else ""
        return Answer("".join(texts[: length - ended]), texts, tuple(tops), end, ended)

    def _path(self, said: Any) -> Path | None:
        return None if self._folder is None else self._folder / f"{text_digest(json.dumps(said))}.json"


def _read(path: Path) -> list[Probe] | None:
    """Return the probes of a file; None if it is missing or holds something else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            Probe(tuple(map(int, row["ids"])), {name: Answer.from_json(answer) for name, answer in row["answers"].items()})
            for row in rows
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
