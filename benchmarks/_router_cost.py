"""What routers cost over the base model, beside peft's: a forward, tokens generated one by one, a training step."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from _adapters import base_model, difference, random_adapter
from _ratios import Gate, Way, compare, console, require
from _xlora_cost import Xlora, passes
from peft.tuners.lora.arrow import create_arrow_model

import loraweave as lw
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights

NUM_EXPERTS = 4
TOP_K = 3
SEED = 42
PROMPT_TOKENS = 32
NEW_TOKENS = 32
LIMIT = 1e-4
ROUTERS = ("arrow", "xlora")

Context = Callable[[], AbstractContextManager[Any]]


class Setting:
    """One base model with our Composer, and for each router a copy of it in peft with the same experts."""

    def __init__(self, rows: int, tokens: int, rank: int, routers: Sequence[str], *, peers: bool, seed: int) -> None:
        self.model, _ = base_model()
        self.model.requires_grad_(False)
        adapters = [random_adapter(self.model, f"random{n:02d}", "all", seed, rank=rank) for n in range(NUM_EXPERTS)]
        self.pool = ExpertPool({each.name: each for each in adapters})
        self.engine = lw.Composer(self.model, self.pool)
        generator = torch.Generator().manual_seed(seed)
        self.ids_BT = torch.randint(0, self.model.config.vocab_size, (rows, tokens), generator=generator)
        values_BTLE = torch.randn(rows, tokens, len(self.pool.layer_names), NUM_EXPERTS, generator=generator).softmax(dim=-1)
        self.given = MixtureWeights(values_BTLE, self.pool.names, tuple(self.pool.layer_names))
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
    with engine.activate(MixtureWeights(torch.stack(spread, dim=2), tuple(used.experts), layers)):
        given = model(ids_BT[:2]).logits
    checks = [Gate("weights by token given equal the same weights made", difference(given, found), LIMIT)]
    if setting.peft is not None:
        checks.append(Gate("arrow equals peft's", difference(found, setting.peft(ids_BT[:2]).logits), LIMIT))
    # equal answers prove nothing where the adapters change nothing
    return [*checks, Gate("limit over the change that the adapters make", LIMIT / difference(found, base), 0.1)]


def all_gates(setting: Setting) -> list[Gate]:
    """Those of every router that is measured."""
    found = gates(setting) if "arrow" in setting.routers else []
    return found if setting.xlora is None else [*found, *setting.xlora.gates(setting.ids_BT[:2])]


def forward_way(setting: Setting, forward: Callable[..., Any], context: Context, *, cached: bool = True) -> Way:
    """All tokens at once, and logits of the last one. Nothing is cached."""
    last = torch.tensor([setting.ids_BT.shape[1] - 1])

    @torch.inference_mode()
    def run() -> None:
        with context():
            forward(input_ids=setting.ids_BT, use_cache=False, logits_to_keep=last)

    return Way(run)


def generate_way(setting: Setting, forward: Callable[..., Any], context: Context, *, cached: bool = True) -> Way:
    """Greedy tokens with the key-value cache, the prompt's pass among them; else all tokens again for each."""
    prompt_BT = setting.ids_BT[:, :PROMPT_TOKENS]

    @torch.inference_mode()
    def run() -> None:
        token_BT, cache = prompt_BT, None
        with context():
            for _ in range(NEW_TOKENS):
                if cached:
                    output = forward(input_ids=token_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token_BT, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
                else:
                    output = forward(input_ids=token_BT, use_cache=False, logits_to_keep=1)
                    token_BT = torch.cat([token_BT, output.logits[:, -1:].argmax(dim=-1)], dim=1)

    return Way(run)


def ways(setting: Setting, what: str) -> Mapping[str, Way]:
    """Every way by its label, the base first."""
    if what == "train":
        assert setting.xlora is not None
        return setting.xlora.training_ways(setting.ids_BT)
    make = partial(forward_way if what == "forward" else generate_way, setting)
    found = {"base alone": make(setting.model, nullcontext)}
    if "arrow" in setting.routers:
        if what == "forward":
            found["loraweave, weights given by token"] = make(setting.model, setting.active(setting.given))
        found["loraweave, arrow"] = make(setting.model, setting.active(setting.arrow))
        if setting.peft is not None:
            found["peft, arrow"] = make(setting.peft, nullcontext)
    return found if setting.xlora is None else found | passes(setting.xlora, make, cached=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What of it is measured."""
    parser.add_argument("what", choices=("forward", "generate", "train"), help="which pass is measured")
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=ROUTERS, help="train: xlora alone")
    parser.add_argument("--rows", type=int, default=8, help="of the batch")
    parser.add_argument("--tokens", type=int, default=128, help="of a row in forward, at least 32")
    parser.add_argument("--rank", type=int, default=8, help="of each adapter")
    parser.add_argument("--no-peers", action="store_true", help="measure without peft")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many")
    parser.add_argument("--seconds", type=float, default=120.0, help="no round that would end later")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cpu", action="store_true", help="count processor time, for one thread on a busy machine")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and the random adapters")


def main(options: argparse.Namespace) -> None:
    """Prints the gates, and the ratios if they are green; SystemExit where they are not."""
    torch.set_num_threads(options.threads)
    what = options.what
    routers = ["xlora"] if what == "train" else options.routers
    setting = Setting(options.rows, options.tokens, options.rank, routers, peers=not options.no_peers, seed=options.seed)
    require(all_gates(setting))
    steps = f"{NEW_TOKENS} tokens after {PROMPT_TOKENS}"
    size = f"{options.rows} rows, {steps}" if what == "generate" else f"{options.rows}x{options.tokens}"
    console.print(f"peft {peft.__version__}, torch {torch.__version__}, {options.threads} thread(s)", highlight=False)
    compare(
        f"{what} {size}, {NUM_EXPERTS} adapters of rank {options.rank} on all linear layers, fp32",
        ways(setting, what),
        rounds=options.rounds,
        seconds=options.seconds,
        cpu=options.cpu,
        tables={"time, base = 1": ("base alone", False)},
    )
