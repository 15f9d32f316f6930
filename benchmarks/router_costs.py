"""What routers cost over the base model, beside peft's: a forward, tokens generated one by one, a training step.

    python -m benchmarks router_costs forward                     8 rows of 128 tokens
    python -m benchmarks router_costs generate                    32 greedy tokens with KV cache after a prompt of 32
    python -m benchmarks router_costs train --rows 4 --tokens 64  (forward and backward of a step; xlora alone)

Time relative to the base model's own pass, or its forward and backward through the activations, for arrow and xlora beside
peft's and for weights given by token. Opening an activation is part of our time. Logits and gradients are compared first,
and nothing is reported where they differ. X-LoRA has one network in both; peft's generates without a cache.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import peft
import torch
import typer
from peft.tuners.lora.arrow import create_arrow_model
from torch import Tensor
from torch.nn.functional import cross_entropy

import loraweave as lw
from benchmarks._models import (
    LIMIT,
    Context,
    base_model,
    changes,
    difference,
    generate,
    keep_blocks,
    prefill,
    random_adapters,
    tokens,
)
from benchmarks._run import Run, console
from benchmarks._timing import Gate, Way, compare, require
from loraweave.extensions.accelerators.kernels.native_rows import NativeRows
from loraweave.routers.tokens._learned import Step

NUM_EXPERTS = 4
TOP_K = 3
SEED = 42
PROMPT_TOKENS = 32
NEW_TOKENS = 32
ROUTERS = ("arrow", "xlora")

app = typer.Typer()


class Setting:
    """One base model with our Composer, and for each router a copy of it in peft with the same experts."""

    def __init__(
        self, rows: int, length: int, rank: int, routers: Sequence[str], *, blocks: int | None, peers: bool, seed: int
    ) -> None:
        self.model, _ = base_model()
        if blocks is not None:
            keep_blocks(self.model, blocks)
        self.pool = lw.ExpertPool(random_adapters(self.model, NUM_EXPERTS, "all", seed, rank=rank))
        self.engine = lw.Composer(self.model, self.pool)
        self.ids_BT = tokens(self.model, rows, length, seed)
        generator = torch.Generator().manual_seed(seed)
        values_BTLE = torch.randn(rows, length, len(self.pool.layer_names), NUM_EXPERTS, generator=generator).softmax(dim=-1)
        self.given = lw.MixtureWeights(values_BTLE, self.pool.names, tuple(self.pool.layer_names))
        # as peft's, whose vectors are those of 15 steps
        self.arrow = lw.router("arrow", self.pool, top_k=TOP_K, direction="power_iteration", seed=SEED)
        self.routers = routers
        self.peft = self._in_peft() if peers and "arrow" in routers else None
        self.xlora = Xlora(self.engine, peers=peers, seed=seed) if "xlora" in routers else None

    def _in_peft(self) -> Any:
        config = peft.ArrowConfig(top_k=TOP_K, router_temperature=1.0, rng_seed=SEED)
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(each.save_pretrained(Path(folder) / name)) for name, each in self.pool.adapters.items()]
            return create_arrow_model(copy.deepcopy(self.model), paths, config).eval()

    def active(self, mixture: Any) -> Context:
        return lambda: self.engine.activate(mixture)

    def to(self, dtype: torch.dtype) -> None:
        for model in (self.model, self.peft, None if self.xlora is None else self.xlora.peft):
            if model is not None:
                model.to(dtype)


@torch.no_grad()
def gates(setting: Setting) -> list[Gate]:
    """Ours against peft, and the weights of a token given against the same weights made, over all tokens."""
    ids_BT, model, engine = setting.ids_BT, setting.model, setting.engine
    base = model(ids_BT[:2]).logits
    with engine.activate(setting.arrow), engine.record() as trace:
        found = model(ids_BT[:2]).logits
    used = trace.weights
    layers = tuple(used)
    spread = [used[layer].expand(*ids_BT[:2].shape, NUM_EXPERTS) for layer in layers]
    with engine.activate(lw.MixtureWeights(torch.stack(spread, dim=2), tuple(used.experts), layers)):
        given = model(ids_BT[:2]).logits
    checks = [Gate("weights by token given equal the same weights made", difference(given, found), LIMIT)]
    if setting.peft is not None:
        checks.append(Gate("arrow equals peft's", difference(found, setting.peft(ids_BT[:2]).logits), LIMIT))
    return [*checks, changes("adapters", difference(found, base))]


def all_gates(setting: Setting) -> list[Gate]:
    """Those of every router that is measured."""
    found = gates(setting) if "arrow" in setting.routers else []
    return found if setting.xlora is None else [*found, *setting.xlora.gates(setting.ids_BT[:2])]


class Xlora:
    """Our router in an engine, and a copy of its model in peft with the same experts and the same network."""

    def __init__(self, engine: lw.Composer, *, peers: bool, seed: int) -> None:
        self.engine = engine
        self.model: Any = engine.model
        config: Any = engine.model.config
        torch.manual_seed(seed)
        self.router: Any = lw.router("xlora", engine.pool, hidden_size=config.hidden_size)
        self.peft = self._in_peft() if peers else None

    def active(self) -> AbstractContextManager[Any]:
        return self.engine.activate(self.router)

    def _in_peft(self) -> Any:
        model = copy.deepcopy(self.model)
        model.config.use_cache = False
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapters = self.engine.pool.adapters.values()
            # theirs have to be named by their places
            paths = {str(n): str(each.save_pretrained(Path(folder) / str(n))) for n, each in enumerate(adapters)}
            size = self.model.config.hidden_size
            made = peft.get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=size, adapters=paths))
        state = {name.replace("head.", "layers."): value for name, value in self.router.state_dict().items()}
        made.base_model.internal_xlora_classifier.load_state_dict(state)
        return made.eval()

    def gates(self, ids_BT: Tensor) -> list[Gate]:
        """Logits and gradients against peft's, and those of a call under the caches against those of all tokens at once."""
        middle = ids_BT.shape[1] // 2
        with torch.no_grad():
            base = self.model(ids_BT).logits
            with self.active():
                whole = self.model(ids_BT).logits
                cache = self.model(ids_BT[:, :middle], use_cache=True).past_key_values
                rest = self.model(ids_BT[:, middle:], past_key_values=cache, use_cache=True).logits
        checks = [Gate("xlora is the same under caches", difference(rest, whole[:, middle:]), LIMIT)]
        first, kept = self._gradient(ids_BT, {}), self._gradient(ids_BT, self._kept(ids_BT))
        checks.append(Gate("gradient with kept states equals that without", difference(kept, first), LIMIT))
        if self.peft is not None:
            with torch.no_grad():
                checks.append(Gate("xlora equals peft's", difference(whole, self.peft(input_ids=ids_BT).logits), LIMIT))
            loss(self.peft, input_ids=ids_BT).backward()
            weight = self.peft.base_model.internal_xlora_classifier.layers[0].weight
            checks.append(Gate("gradient equals peft's", difference(first, weight.grad), LIMIT))
        return [*checks, changes("adapters", difference(whole, base))]

    def training_ways(self, ids_BT: Tensor) -> Mapping[str, Way]:
        """A step's forward and backward; of the frozen base through its activations, with nothing to learn."""
        embedded = self.model.get_input_embeddings()(ids_BT)

        def base() -> None:
            loss(self.model, inputs_embeds=embedded.detach().requires_grad_()).backward()

        kept = self._kept(ids_BT)
        found = {
            "base alone": Way(base),
            "loraweave, xlora": Way(lambda: self._gradient(ids_BT, {})),
            "loraweave, xlora, states kept": Way(lambda: self._gradient(ids_BT, kept)),
        }
        if self.peft is not None:
            theirs = self.peft
            found["peft, xlora"] = Way(lambda: loss(theirs, input_ids=ids_BT).backward())
        return found

    def _kept(self, ids_BT: Tensor) -> dict[Any, Any]:
        """What the training keeps of these rows after their first step."""
        kept: dict[Any, Any] = {}
        self._gradient(ids_BT, kept)
        return kept

    def _gradient(self, ids_BT: Tensor, kept: dict[Any, Any]) -> Tensor:
        rows_B = torch.arange(ids_BT.shape[0])
        self.router.zero_grad()
        self.router.step = Step(torch.ones_like(ids_BT), torch.full_like(rows_B, -1), rows_B, kept)
        try:
            with self.active():
                loss(self.model, input_ids=ids_BT).backward()
        finally:
            self.router.step = None
        gradient: Tensor = self.router.head[0].weight.grad
        return gradient


def loss(forward: Callable[..., Any], **inputs: Tensor) -> Tensor:
    """Of ever the same made-up targets, all tokens counting."""
    logits_NV = forward(**inputs, use_cache=False).logits.flatten(0, 1)
    return cross_entropy(logits_NV, torch.arange(logits_NV.shape[0]) % logits_NV.shape[1])


def by_torch(active: Context) -> Context:
    """The same without the compiled library, for few tokens."""

    @contextmanager
    def found() -> Iterator[None]:
        with patch.object(NativeRows, "runs", lambda *place: False), active():
            yield

    return found


def ways(setting: Setting, what: str) -> Mapping[str, Way]:
    """Every way by its label, the base first."""
    if what == "train":
        assert setting.xlora is not None
        return setting.xlora.training_ways(setting.ids_BT)

    def make(forward: Callable[..., Any], context: Context = nullcontext, *, cached: bool = True) -> Way:
        if what == "forward":
            return Way(prefill(forward, setting.ids_BT, context))
        return Way(generate(forward, setting.ids_BT[:, :PROMPT_TOKENS], NEW_TOKENS, context, cached=cached))

    found = {"base alone": make(setting.model)}
    if "arrow" in setting.routers:
        if what == "forward":
            found["loraweave, weights given by token"] = make(setting.model, setting.active(setting.given))
        found["loraweave, arrow"] = make(setting.model, setting.active(setting.arrow))
        if what == "generate":
            found["loraweave, arrow, without compiled code"] = make(setting.model, by_torch(setting.active(setting.arrow)))
        if setting.peft is not None:
            found["peft, arrow"] = make(setting.peft)
    if setting.xlora is not None:
        found["loraweave, xlora"] = make(setting.model, setting.xlora.active)
        if what == "generate":
            found["loraweave, xlora, without compiled code"] = make(setting.model, by_torch(setting.xlora.active))
        if setting.xlora.peft is not None:
            # which keeps no cache
            found["peft, xlora"] = make(setting.xlora.peft, cached=False)
    return found


@app.command()
def main(
    context: typer.Context,
    what: Annotated[Literal["forward", "generate", "train"], typer.Argument(help="which pass is measured")],
    routers: Annotated[str, typer.Option(help="arrow, xlora or both; train: xlora alone")] = ",".join(ROUTERS),
    rows: Annotated[int, typer.Option(help="of the batch")] = 8,
    length: Annotated[int, typer.Option("--tokens", help="of a row in forward, at least 32")] = 128,
    rank: Annotated[int, typer.Option(help="of each adapter")] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model and the factors")] = "float32",
    blocks: Annotated[int | None, typer.Option(help="the first so many, without the head; all by default")] = None,
    peers: Annotated[bool, typer.Option(help="measure peft too")] = True,
) -> None:
    """Prints the gates, and the ratios if they are green."""
    run: Run = context.obj
    chosen = ["xlora"] if what == "train" else routers.split(",")
    setting = Setting(rows, length, rank, chosen, blocks=blocks, peers=peers, seed=run.seed)
    require(all_gates(setting))
    setting.to(getattr(torch, dtype))
    size = f"{rows} rows, {NEW_TOKENS} tokens after {PROMPT_TOKENS}" if what == "generate" else f"{rows}x{length}"
    console.print(f"peft {peft.__version__}, torch {torch.__version__}")
    kept = "" if blocks is None else f", first {blocks} blocks without the head"
    title = f"{what} {size}, {NUM_EXPERTS} adapters of rank {rank} on all linear layers, {dtype}{kept}"
    compare(run, title, ways(setting, what), {"time, base = 1": ("base alone", False)}, seconds=120.0)
