"""What live mixtures cost over the base model, beside peft and polylora: prefill and decode of mixed batches.

    python benchmarks/live.py prefill                        8 rows of 128 tokens, each with its own adapter of 20
    python benchmarks/live.py decode --experts 4             16 greedy tokens with KV cache, a mixture of four per row
    python benchmarks/live.py decode --dtype bfloat16 --rows 32 --pool 100 --no-peers

Opening an activation and making its weights are part of our time; peft's `set_adapter` and `set_scale`, and its merging of
mixtures beforehand, are not part of its. "New mixture" is ours for a mixture not seen before, whose factors are gathered in
that call; else the mixture is one of the last. "Adapters off" is the control: peft's copy of the base, which should cost
what the base does. Logits are compared in fp32 before anything is timed. In bfloat16 the adapters of the peers are
bfloat16 too. The limits are those of the mixture's arithmetic and, for decoding, of reading its factors beside the base's
weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import typer
from _adapters import base_model, difference, mix_in_peft, random_adapter
from _live_peers import VERSIONS, Peft, polylora
from _ratios import Gate, Way, compare, console, require

import loraweave as lw

PROMPT_TOKENS = 16
NEW_TOKENS = 16
WEIGHTS = (0.5, 0.4, 0.3, -0.2)
LIMIT = 1e-4
# distinct factors for so many experts; a larger pool has each under several names
NUM_DISTINCT = 100

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """What is measured: rows with `experts` of a pool of `pool` adapters of rank `rank` each."""

    rows: int
    tokens: int
    pool: int
    rank: int
    experts: int
    targets: str


class Setting:
    """The model with our Composer, the same model in the peers, and the mixtures that all are asked for."""

    def __init__(self, model: Any, shape: Shape, *, peers: bool, seed: int) -> None:
        self.model = model
        self.shape = shape
        distinct = min(shape.pool, NUM_DISTINCT)
        made = [random_adapter(model, f"random{n:02d}", shape.targets, seed, rank=shape.rank) for n in range(distinct)]
        # as peft leaves its copy: whether parameters learn changes which products torch chooses
        model.requires_grad_(False)
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
            self.polylora = polylora(model, named, shape.targets, shape.rank) if shape.experts == 1 else None
        generator = torch.Generator().manual_seed(seed)
        self.ids_BT = torch.randint(0, model.config.vocab_size, (shape.rows, shape.tokens), generator=generator)

    def to(self, dtype: torch.dtype) -> None:
        for model in (self.model, self.peft, self.polylora):
            if model is not None:
                model.to(dtype)

    def in_polylora(self, **inputs: Any) -> Any:
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
        checks.append(
            Gate(
                "a mixture per row equals polylora's", difference(found, setting.in_polylora(input_ids=ids_BT).logits), LIMIT
            )
        )
    # equal answers prove nothing where the adapters change nothing: every row of every mixture must be far from the base
    nearest = min(difference(logits[row], base[row]) for logits in (found, shared) for row in range(len(setting.rows)))
    return [*checks, Gate("limit over the change that the adapters make", LIMIT / max(nearest, 1e-30), 0.1)]


def prefill_way(setting: Setting, forward: Forward, context: Callable[[], AbstractContextManager[Any]], prepare: Any) -> Way:
    # an index: of a slice, the head of a frozen model makes a batched product that copies the vocabulary for every row
    last = torch.tensor([setting.shape.tokens - 1])

    @torch.inference_mode()
    def run() -> None:
        with context():
            forward(input_ids=setting.ids_BT, use_cache=False, logits_to_keep=last)

    return Way(run, prepare)


def decode_way(setting: Setting, forward: Forward, context: Callable[[], AbstractContextManager[Any]], prepare: Any) -> Way:
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
    what = "adapter" if setting.shape.experts == 1 else "mixture"
    found = {"base alone": make(setting, model, nullcontext, nothing)}
    found[f"loraweave, own {what} per row"] = make(setting, model, lambda: engine.activate(rows), nothing)
    found["loraweave, new mixture"] = make(setting, model, lambda: engine.activate(rows), engine._plans.clear)
    found[f"loraweave, one {what} for all"] = make(setting, model, lambda: engine.activate(rows[0]), nothing)
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
        found["polylora"] = make(setting, setting.in_polylora, nullcontext, nothing)
    return found


def limits(setting: Setting) -> tuple[float, float]:
    """The forward's floating point operations, and a decoding step's bytes of weights, with the mixtures, base = 1."""
    shape, model = setting.shape, setting.model
    width = sum(layer.num_inputs + layer.num_outputs for layer in setting.engine.target_layers.values())
    block = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers." in name)
    weights = block + model.get_input_embeddings().weight.numel()
    ranks = shape.experts * shape.rank
    distinct = len({name for row in setting.rows for name in row}) * shape.rank
    return 1 + ranks * width / block, 1 + distinct * width / weights


def main(
    what: Annotated[Literal["prefill", "decode"], typer.Argument(help="which pass is measured")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model and the factors")] = "float32",
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers that the adapters update")] = "all",
    rows: Annotated[int, typer.Option(help="of the batch")] = 8,
    tokens: Annotated[int, typer.Option(help="of a row in prefill")] = 128,
    pool: Annotated[int, typer.Option(help="adapters in the pool")] = 20,
    rank: Annotated[int, typer.Option(help="of each adapter")] = 8,
    experts: Annotated[int, typer.Option(help="of each row's mixture, 1 to 4", min=1, max=4)] = 1,
    peers: Annotated[bool, typer.Option(help="measure peft and polylora too")] = True,
    rounds: Annotated[int, typer.Option(help="at most so many rounds")] = 15,
    seconds: Annotated[float, typer.Option(help="no round that would end later")] = 90.0,
    threads: Annotated[int, typer.Option(help="of torch")] = 2,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of the mixtures, the tokens and random adapters")] = 0,
) -> None:
    """Time relative to the base model's own pass over the same tokens."""
    torch.set_num_threads(threads)
    model, _ = base_model()
    setting = Setting(model, Shape(rows, tokens, pool, rank, experts, targets), peers=peers, seed=seed)
    require(gates(setting))
    setting.to(getattr(torch, dtype))
    prefill = what == "prefill"
    size = f"{rows}x{tokens}" if prefill else f"{rows} rows, {NEW_TOKENS} tokens"
    console.print(f"{VERSIONS}, {threads} thread(s)", highlight=False)
    title = f"{what} {size}, {experts} of {pool} adapters of rank {rank} a row, on {targets}, {dtype}"
    make = prefill_way if prefill else decode_way
    compare(
        title,
        ways(setting, make, prefill),
        rounds=rounds,
        seconds=seconds,
        cpu=cpu,
        tables={"time, base = 1": ("base alone", False)},
    )
    flops, num_bytes = limits(setting)
    console.print(f"limits, base = 1: arithmetic {flops:.3f}, bytes of a decoding step {num_bytes:.2f}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
