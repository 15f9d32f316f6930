"""What live mixtures cost over the base model, beside peft and polylora: prefill and decode of mixed batches.

    python -m benchmarks --threads 2 live prefill                  8 rows of 128 tokens, each with its own adapter of 20
    python -m benchmarks --threads 2 live decode --experts 4       16 greedy tokens with KV cache, a mixture of four per row
    python -m benchmarks --threads 1 --cpu live decode --blocks 6 --stored float16    the first six blocks alone
    python -m benchmarks --threads 2 live decode --dtype bfloat16 --rows 32 --size 100 --no-peers
    python -m benchmarks --cpu --base qwen2.5-coder-0.5b live decode --only "per row,for all,adapter_names"

Opening an activation and making its weights are part of our time; peft's `set_adapter` and `set_scale`, and its merging of
mixtures beforehand, are not part of its. "New mixture" is ours for a mixture not seen before, whose factors are gathered in
that call; else the mixture is one of the last. "Adapters off" is the control: peft's copy of the base, which should cost
what the base does. Logits are compared in fp32 before anything is timed. In bfloat16 the adapters of the peers are
bfloat16 too. The limits are those of the mixture's arithmetic and, for decoding, of reading its factors beside the base's
weights.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import peft
import torch
import typer
from peft.tuners.lora import LoraLayer

import loraweave as lw
from benchmarks._models import (
    ALL,
    ATTENTION,
    LIMIT,
    Context,
    base_model,
    changes,
    difference,
    in_peft,
    keep_blocks,
    mix_in_peft,
    prefill,
    random_adapters,
    tokens,
)
from benchmarks._run import Run, console
from benchmarks._timing import Gate, Way, compare, require
from loraweave.composer.live import row_weights
from loraweave.extensions.accelerators import batch_invariant
from loraweave.extensions.accelerators.kernels import native_rows

PROMPT_TOKENS = 16
NEW_TOKENS = 16
WEIGHTS = (0.5, 0.4, 0.3, -0.2)
# distinct factors for so many experts; a larger pool has each under several names
NUM_DISTINCT = 100

app = typer.Typer()


@dataclass(frozen=True)
class Shape:
    """What is measured: rows with `experts` of a pool of `pool` adapters of rank `rank` each."""

    rows: int
    tokens: int
    pool: int
    rank: int
    experts: int
    targets: str
    stored: torch.dtype = torch.float32


class Peft:
    """One PeftModel with all the adapters, and with every row's mixture merged to an adapter if there are mixtures."""

    def __init__(self, model: Any, experts: Sequence[lw.Adapter], rows: Sequence[Mapping[str, float]]) -> None:
        self.model = in_peft(model, experts)
        self.names = [next(iter(row)) for row in rows]
        self.rows = rows
        if any(len(row) > 1 for row in rows):
            self.names = []
            for number, row in enumerate(rows):
                self.names.append(f"merged{number}")
                self.model.add_weighted_adapter(list(row), list(row.values()), self.names[-1], combination_type="cat")

    def off(self) -> None:
        self.model.base_model.disable_adapter_layers()

    def each_alone(self) -> None:
        """Every adapter has weight one again."""
        self.model.base_model.enable_adapter_layers()
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for name in module.lora_A:
                    module.set_scale(name, 1.0)

    def together(self) -> None:
        self.model.base_model.enable_adapter_layers()
        mix_in_peft(self.model, self.rows[0])

    def by_row(self, **inputs: Any) -> Any:
        return self.model(adapter_names=self.names, **inputs)

    def merged_by_row(self, *, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """Each row after the other: its adapter merged into the weights, its forward pass, and the weights back."""
        found = []
        for name, row_1T in zip(self.names, input_ids.split(1), strict=True):
            self.model.base_model.set_adapter(name)
            self.model.merge_adapter()
            found.append(self.model(input_ids=row_1T, **inputs).logits)
            self.model.unmerge_adapter()
        return torch.cat(found)


def in_polylora(model: Any, experts: Sequence[lw.Adapter], shape: Shape) -> Any | None:
    """A PolyLoraModel around a copy of the model; None where the package is not installed (`pip install polylora`)."""
    try:
        import polylora as package
    except ImportError:
        return None
    names = list(ALL if shape.targets == "all" else ATTENTION)
    config = package.PolyLoraConfig(max_gpu_adapters=len(experts) + 1, max_rank=shape.rank, target_modules=names)
    wrapped = package.PolyLoraModel(copy.deepcopy(model), config).eval()
    with tempfile.TemporaryDirectory() as folder:
        for adapter in experts:
            wrapped.load_adapter_from_disk(adapter.name, adapter.save_pretrained(Path(folder) / adapter.name))
    return wrapped


def _stored(adapter: lw.Adapter, dtype: torch.dtype) -> lw.Adapter:
    """As it is in fp32 after its file held it in that dtype."""
    layers = {
        layer: replace(factors, a_RI=factors.a_RI.to(dtype).float(), b_OR=factors.b_OR.to(dtype).float())
        for layer, factors in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


class Setting:
    """The model with our Composer, the same model in the peers, and the mixtures that all are asked for."""

    def __init__(self, model: Any, shape: Shape, *, peers: bool, seed: int) -> None:
        self.model, self.shape = model, shape
        distinct = min(shape.pool, NUM_DISTINCT)
        made = [
            _stored(each, shape.stored) for each in random_adapters(model, distinct, shape.targets, seed, rank=shape.rank)
        ]
        pool = {f"expert{number}": made[number % distinct] for number in range(shape.pool)}
        self.engine = lw.Composer(model, pool)
        rng = random.Random(seed)
        # peft has all adapters in memory, and takes as long for a load as it has adapters
        offered = list(pool)[: distinct if peers else shape.pool]
        chosen = rng.sample(offered, shape.rows) if shape.experts == 1 and len(offered) >= shape.rows else None
        weights = (1.0,) if shape.experts == 1 else WEIGHTS[: shape.experts]
        self.rows = [
            dict(zip([chosen[n]] if chosen else rng.sample(offered, shape.experts), weights, strict=True))
            for n in range(shape.rows)
        ]
        self.peft = self.polylora = None
        if peers:
            named = [lw.Adapter(name, pool[name].base_model, pool[name].layers) for name in offered]
            self.peft = Peft(model, named, self.rows)
            self.polylora = in_polylora(model, named, shape) if shape.experts == 1 else None
        self.ids_BT = tokens(model, shape.rows, shape.tokens, seed)

    def to(self, dtype: torch.dtype) -> None:
        for model in (self.model, self.peft.model if self.peft else None, self.polylora):
            if model is not None:
                model.to(dtype)

    def by_polylora(self, **inputs: Any) -> Any:
        assert self.polylora is not None
        return self.polylora(adapter_ids=[next(iter(row)) for row in self.rows], **inputs)


@torch.no_grad()
def gates(setting: Setting) -> list[Gate]:
    """Ours against each peer, in fp32 over a few tokens."""
    ids_BT = setting.ids_BT[:, :9]
    with setting.engine.activate(setting.rows):
        found = setting.model(ids_BT).logits
    with setting.engine.activate(setting.rows[0]):
        shared = setting.model(ids_BT).logits
    base = setting.model(ids_BT).logits
    checks = []
    if setting.peft is not None:
        setting.peft.each_alone()
        by_row = setting.peft.by_row(input_ids=ids_BT).logits
        checks.append(Gate("a mixture per row equals peft's", difference(found, by_row), LIMIT))
        mix_in_peft(setting.peft.model, setting.rows[0])
        expected = setting.peft.model(ids_BT).logits
        checks.append(Gate("one mixture for all rows equals peft's", difference(shared, expected), LIMIT))
    if setting.polylora is not None:
        theirs = setting.by_polylora(input_ids=ids_BT).logits
        checks.append(Gate("a mixture per row equals polylora's", difference(found, theirs), LIMIT))
    # every row of every mixture
    nearest = min(difference(logits[row], base[row]) for logits in (found, shared) for row in range(len(setting.rows)))
    return [*checks, changes("adapters", nearest)]


def prefill_way(setting: Setting, forward: Callable[..., Any], context: Context, prepare: Callable[[], object]) -> Way:
    return Way(prefill(forward, setting.ids_BT, context), prepare)


def decode_way(setting: Setting, forward: Callable[..., Any], context: Context, prepare: Callable[[], object]) -> Way:
    """The prompt's pass is not timed."""
    prompt_BT = setting.ids_BT[:, :PROMPT_TOKENS]
    state: list[Any] = []

    @torch.inference_mode()
    def prepared() -> None:
        prepare()
        if not state:
            with context():
                output = forward(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
            state.extend([output.past_key_values, output.logits[:, -1:].argmax(dim=-1)])
        excess = state[0].get_seq_length() - PROMPT_TOKENS
        if excess:
            state[0].crop(-excess)

    @torch.inference_mode()
    def run() -> None:
        cache, token_B1 = state
        with context():
            for _ in range(NEW_TOKENS):
                output = forward(input_ids=token_B1, past_key_values=cache, use_cache=True)
                token_B1 = output.logits[:, -1:].argmax(dim=-1)

    return Way(run, prepared)


def ways(setting: Setting, make: Callable[..., Way], prefill: bool) -> dict[str, Way]:
    """Every way by its label, the base first."""

    def nothing() -> None:
        pass

    engine, model, rows = setting.engine, setting.model, setting.rows

    @contextmanager
    def invariant(mixtures: Any) -> Iterator[None]:
        with batch_invariant(model), engine.activate(mixtures):
            yield

    def without(module: Any, name: str, instead: Any) -> Context:
        # what a layer remembers of the first call holds for the next
        plain = lw.Composer(model, engine.pool)

        @contextmanager
        def changed() -> Iterator[None]:
            with patch.object(module, name, lambda *given: instead), plain.activate(rows):
                yield

        return changed

    what = "adapter" if setting.shape.experts == 1 else "mixture"
    found = {"base alone": make(setting, model, nullcontext, nothing)}
    found[f"loraweave, own {what} per row"] = make(setting, model, lambda: engine.activate(rows), nothing)
    by_torch = without(row_weights, "compiled_threads", 0)
    found[f"loraweave, own {what} per row, without compiled code"] = make(setting, model, by_torch, nothing)
    if setting.shape.stored is not torch.float32:
        in_fp32 = without(native_rows, "shorten", None)
        found[f"loraweave, own {what} per row, factors read in fp32"] = make(setting, model, in_fp32, nothing)
    found["loraweave, new mixture"] = make(setting, model, lambda: engine.activate(rows), engine._plans.clear)
    found[f"loraweave, one {what} for all"] = make(setting, model, lambda: engine.activate(rows[0]), nothing)
    found["base, batch-invariant"] = make(setting, model, lambda: invariant({}), nothing)
    found[f"loraweave, own {what} per row, batch-invariant"] = make(setting, model, lambda: invariant(rows), nothing)
    if setting.peft is not None:
        theirs = setting.peft
        # the control: a copy of the base that costs something else than the base is a fault of this benchmark
        found["control: peft, adapters off"] = make(setting, theirs.model, nullcontext, theirs.off)
        merged = "" if setting.shape.experts == 1 else ", merged beforehand"
        found[f"peft, adapter_names{merged}"] = make(setting, theirs.by_row, nullcontext, theirs.each_alone)
        found[f"peft, set_adapter, one {what} for all"] = make(setting, theirs.model, nullcontext, theirs.together)
        if prefill:
            found["peft, merge and unmerge per row"] = make(setting, theirs.merged_by_row, nullcontext, theirs.each_alone)
    if setting.polylora is not None:
        found["polylora"] = make(setting, setting.by_polylora, nullcontext, nothing)
    return found


def limits(setting: Setting) -> tuple[float, float]:
    """The forward's floating point operations, and a decoding step's bytes of weights, with the mixtures, base = 1."""
    shape, model = setting.shape, setting.model
    width = sum(layer.num_inputs + layer.num_outputs for layer in setting.engine.target_layers.values())
    block = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers." in name)
    weights = block + model.get_output_embeddings().weight.numel()
    ranks = shape.experts * shape.rank
    distinct = len({name for row in setting.rows for name in row}) * shape.rank
    return 1 + ranks * width / block, 1 + distinct * width / weights


@app.command()
def main(
    context: typer.Context,
    what: Annotated[Literal["prefill", "decode"], typer.Argument(help="which pass is measured")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model and the factors")] = "float32",
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers that the adapters update")] = "all",
    rows: Annotated[int, typer.Option(help="of the batch")] = 8,
    tokens: Annotated[int, typer.Option(help="of a row in prefill")] = 128,
    size: Annotated[int, typer.Option(help="adapters in the pool")] = 20,
    rank: Annotated[int, typer.Option(help="of each adapter")] = 8,
    stored: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="what the adapters' files hold")
    ] = "float32",
    experts: Annotated[int, typer.Option(help="of each row's mixture, 1 to 4", min=1, max=4)] = 1,
    blocks: Annotated[int | None, typer.Option(help="the first so many, without the head; all by default")] = None,
    peers: Annotated[bool, typer.Option(help="measure peft and polylora too")] = True,
    only: Annotated[str, typer.Option(help="ways whose names have one of these parts, with commas; all by default")] = "",
) -> None:
    """Time relative to the base model's own pass over the same tokens."""
    run: Run = context.obj
    model, _ = base_model()
    if blocks is not None:
        keep_blocks(model, blocks)
    shape = Shape(rows, tokens, size, rank, experts, targets, getattr(torch, stored))
    setting = Setting(model, shape, peers=peers, seed=run.seed)
    require(gates(setting))
    setting.to(getattr(torch, dtype))
    prefilled = what == "prefill"
    passed = f"{rows}x{tokens}" if prefilled else f"{rows} rows, {NEW_TOKENS} tokens"
    console.print(f"peft {peft.__version__}, torch {torch.__version__}")
    kept = "" if stored == "float32" else f", stored in {stored}"
    part = "" if blocks is None else f", {blocks} block(s)"
    on = f"{targets} of {model.name_or_path}{part}, {dtype}{kept}"
    title = f"{what} {passed}, {experts} of {size} adapters of rank {rank} a row, on {on}"
    found = ways(setting, prefill_way if prefilled else decode_way, prefilled)
    if only:
        found = {name: way for name, way in found.items() if name == "base alone" or any(p in name for p in only.split(","))}
    compare(run, title, found, {"time, base = 1": ("base alone", False)}, seconds=90.0)
    flops, num_bytes = limits(setting)
    console.print(f"limits, base = 1: arithmetic {flops:.3f}, bytes of a decoding step {num_bytes:.2f}")
