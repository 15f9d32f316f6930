"""What live mixtures cost over the base model, beside peft: prefill and decode of 8 rows.

    python benchmarks/live.py prefill                      8 rows of 64 tokens, 20 adapters of rank 8 on q and v
    python benchmarks/live.py decode --dtype bfloat16      16 greedy tokens with KV cache after 16
    python benchmarks/live.py decode --targets all         on all seven linear layers

Opening an activation and making its weights are part of our time; peft's `set_adapter` and `set_scale` are not part of its.
"Adapters off" is the control: peft's copy of the base, which should cost what the base does. Logits are compared in fp32
before anything is timed. In bfloat16 the adapters of peft are bfloat16 too, like ours, where peft's default is fp32.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
import typer
from _adapters import adapters, base_model, difference, in_peft, mix_in_peft, one_by_one_in_peft
from _ratios import Gate, Way, compare, require

import loraweave as lw

NUM_ROWS = 8
PREFILL_TOKENS = 64
PROMPT_TOKENS = 16
NEW_TOKENS = 16
WEIGHTS = (0.5, 0.4, 0.3, -0.2)
LIMIT = 1e-4

Forward = Callable[..., Any]


class Setting:
    """The model with our Composer, the same model in peft, and the mixtures that both are asked for."""

    def __init__(self, model: Any, targets: str, seed: int) -> None:
        self.model = model
        experts = adapters(model, targets, seed)
        # as peft leaves its copy: whether parameters learn changes which products torch chooses
        model.requires_grad_(False)
        self.engine = lw.Composer(model, experts)
        self.peft = in_peft(model, experts)
        names = list(self.engine.pool.names)
        rng = random.Random(seed)
        self.shared = dict(zip(rng.sample(names, len(WEIGHTS)), WEIGHTS, strict=True))
        self.own = [dict(zip(rng.sample(names, len(WEIGHTS)), WEIGHTS, strict=True)) for _ in range(NUM_ROWS)]
        self.one_each = rng.sample(names, NUM_ROWS)
        generator = torch.Generator().manual_seed(seed)
        self.ids_BT = torch.randint(0, model.config.vocab_size, (NUM_ROWS, PREFILL_TOKENS), generator=generator)

    def ours(self) -> dict[str, Any]:
        """The mixtures by the label of their row."""
        return {
            "loraweave, shared mixture of 4": self.shared,
            "loraweave, one adapter per row": [{name: 1.0} for name in self.one_each],
            "loraweave, own mixture of 4 per row": self.own,
        }

    def peft_shared(self) -> None:
        self.peft.base_model.enable_adapter_layers()
        mix_in_peft(self.peft, self.shared)

    def peft_off(self) -> None:
        self.peft.base_model.disable_adapter_layers()

    def peft_one_each(self) -> None:
        self.peft.base_model.enable_adapter_layers()
        one_by_one_in_peft(self.peft)

    def peft_by_row(self, **inputs: Any) -> Any:
        return self.peft(adapter_names=self.one_each, **inputs)


@torch.no_grad()
def gates(setting: Setting) -> list[Gate]:
    """Ours against peft wherever peft has an answer; of the rows' own mixtures it can do one row at a time."""
    ids_BT = setting.ids_BT[:, :9]
    found = []
    for mixture in setting.ours().values():
        with setting.engine.activate(mixture):
            found.append(setting.model(ids_BT).logits)
    setting.peft_shared()
    checks = [Gate("shared mixture equals peft's", difference(found[0], setting.peft(ids_BT).logits), LIMIT)]
    setting.peft_one_each()
    by_row = setting.peft_by_row(input_ids=ids_BT).logits
    checks.append(Gate("one adapter per row equals peft's", difference(found[1], by_row), LIMIT))
    for row in (0, NUM_ROWS - 1):
        mix_in_peft(setting.peft, setting.own[row])
        expected = setting.peft(ids_BT[row : row + 1]).logits
        checks.append(Gate(f"row {row}'s own mixture equals peft's", difference(found[2][row : row + 1], expected), LIMIT))
    base = setting.model(ids_BT).logits
    # equal answers prove nothing where the adapters change nothing: every row of every mixture must be far from the base
    nearest = min(difference(logits[row], base[row]) for logits in found for row in range(NUM_ROWS))
    return [*checks, Gate("limit over the change that the adapters make", LIMIT / max(nearest, 1e-30), 0.1)]


def prefill_way(setting: Setting, forward: Forward, context: Callable[[], AbstractContextManager[Any]], prepare: Any) -> Way:
    # an index: of a slice, the head of a frozen model makes a batched product that copies the vocabulary for every row
    last = torch.tensor([PREFILL_TOKENS - 1])

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


def ways(setting: Setting, make: Callable[..., Way]) -> dict[str, Way]:
    """Every way by its label, the base first."""

    def nothing() -> None:
        pass

    def activated(mixture: Any) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: setting.engine.activate(mixture)

    found = {"base alone": make(setting, setting.model, nullcontext, nothing)}
    for label, mixture in setting.ours().items():
        found[label] = make(setting, setting.model, activated(mixture), nothing)
    # the control: a copy of the base that costs something else than the base is a fault of this benchmark
    found["control: peft, adapters off"] = make(setting, setting.peft, nullcontext, setting.peft_off)
    found["peft, set_adapter of the shared 4"] = make(setting, setting.peft, nullcontext, setting.peft_shared)
    found["peft, adapter_names, one per row"] = make(setting, setting.peft_by_row, nullcontext, setting.peft_one_each)
    return found


def main(
    what: Annotated[Literal["prefill", "decode"], typer.Argument(help="which pass is measured")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model and the factors")] = "float32",
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers that the adapters update")] = "qv",
    rounds: Annotated[int, typer.Option(help="at most so many rounds")] = 15,
    seconds: Annotated[float, typer.Option(help="no round that would end later")] = 60.0,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of the mixtures, the tokens and random adapters")] = 0,
) -> None:
    """Time relative to the base model's own pass over the same tokens."""
    torch.set_num_threads(threads)
    model, _ = base_model()
    setting = Setting(model, targets, seed)
    require(gates(setting))
    setting.model.to(getattr(torch, dtype))
    setting.peft.to(getattr(torch, dtype))
    shape = f"8x{PREFILL_TOKENS}" if what == "prefill" else f"8 rows, {NEW_TOKENS} tokens"
    title = f"{what} {shape}, {dtype}, adapters on {targets}, {threads} thread(s)"
    make = prefill_way if what == "prefill" else decode_way
    compare(
        title, ways(setting, make), rounds=rounds, seconds=seconds, cpu=cpu, tables={"time, base = 1": ("base alone", False)}
    )


if __name__ == "__main__":
    typer.run(main)
