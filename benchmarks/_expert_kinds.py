"""What `experts` compares: recipes at about as many parameters, and LoRAs without a mixture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks._models import ALL

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# 32 rank rows at each layer, in experts of rank 4, as far as a recipe can; those of feed-forward layers have 48
NUM_EXPERTS, RANK, FORWARD_RANK = 8, 4, 6
# the gates of a mixture are about 4 rank rows more
ONE = {"num_experts": (1,), "top_k": 1, "balance": 0.0}
# all experts have the same scale, twice the rank over the rank
DEFAULTS = {"target_modules": ALL, "alpha": None, "dropout": 0.0}


@dataclass(frozen=True)
class Kind:
    """A recipe with its options.

    `given` says that a call names each row's task, `apart` that each task has a model alone, for its share of the steps,
    `shares` that the tasks, which are the experts, share the rank rows, `then` that other tasks are trained after these, and
    `federated` that each task is a client, which exchanges experts with the others. `lr` is another than the recipe's.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False
    apart: bool = False
    shares: bool = False
    then: bool = False
    federated: bool = False
    lr: float | None = None

    def all_options(self, num_tasks: int) -> dict[str, Any]:
        rank = {"rank": NUM_EXPERTS * RANK // num_tasks} if self.shares else {}
        return {**DEFAULTS, **rank, **self.options}


def experts(rank: int = RANK, num_experts: Any = NUM_EXPERTS, **options: Any) -> dict[str, Any]:
    return {"rank": rank, "num_experts": num_experts, **options}


def forward_experts(rank: int = FORWARD_RANK, num_experts: int = NUM_EXPERTS, **options: Any) -> dict[str, Any]:
    return experts(rank, num_experts, target_modules=FEED_FORWARD, **options)


ONE_LORA = {**ONE, "rank": NUM_EXPERTS * RANK + 4}
# where moral and loramoe have theirs
ONE_FORWARD_LORA = {**ONE, "rank": NUM_EXPERTS * FORWARD_RANK + 4, "target_modules": FEED_FORWARD}
MOLA = experts(num_experts=(8, 8, 8, 8))
OCTAVIUS = experts(2 * RANK, NUM_EXPERTS // 2)
# its layers are one product more for each rank
FLORA = {"rank": 2, "mode": "multiplicative"}

_AT_3E_3: Mapping[str, Kind] = {
    "one_lora": Kind("mola", ONE_LORA),
    "one_forward_lora": Kind("mola", ONE_FORWARD_LORA),
    "one_lora_active": Kind("mola", {**ONE, "rank": 2 * RANK}),
    "separate": Kind("mola", ONE, given=True, apart=True, shares=True),
    "mola_8888": Kind("mola", MOLA),
    "mola_2468": Kind("mola", experts(6, (2, 4, 6, 8))),
    "mola_5555": Kind("mola", experts(6, (5, 5, 5, 5))),
    "mola_8642": Kind("mola", experts(6, (8, 6, 4, 2))),
    "switch": Kind("switch", experts()),
    "switch_prioritised": Kind("switch", experts(prioritised=True)),
    "switch_unlimited": Kind("switch", experts(capacity=None)),
    "mixtral": Kind("mixtral", experts()),
    "sira": Kind("sira", experts(top_k=2)),
    "sira_first": Kind("sira", experts(top_k=2, prioritised=False)),
    "sira_unlimited": Kind("sira", experts(top_k=2, capacity=None)),
    "hydralora": Kind("hydralora", experts(12, 4)),
    "octavius": Kind("octavius", OCTAVIUS),
    "multilora": Kind("multilora", experts(2 * RANK, NUM_EXPERTS // 2)),
    # each place of a factor has its own key for every one of the pool
    "mixlora_conditional": Kind("mixlora_conditional", experts(num_experts=NUM_EXPERTS)),
    "mixture_of_loras": Kind("mixture_of_loras", shares=True),
    "mixture_of_loras_oracle": Kind("mixture_of_loras", {"oracle": True}, given=True, shares=True),
    "mocle": Kind("mocle", experts(num_experts=NUM_EXPERTS - 1, num_clusters=8)),
    "mocle_by_task": Kind("mocle", experts(num_experts=NUM_EXPERTS - 1, by_task=True), given=True),
    "moelora": Kind("moelora", experts(NUM_EXPERTS * RANK), given=True),
    "flora": Kind("flora", FLORA, given=True),
    "flora_additive": Kind("flora", {"mode": "additive"}, given=True, shares=True),
    "moral": Kind("moral", forward_experts()),
    "loramoe": Kind("loramoe", forward_experts()),
    "llava_mole": Kind("llava_mole", forward_experts(16, 3)),
    "mixlora": Kind("mixlora", {**forward_experts(), "target_modules": ("mlp",)}),
    "fedms": Kind("fedms", {"rank": 6}, given=True, federated=True),
    "pfedlora": Kind("pfedlora", {"shared_rank": 4, "rank": 7}, given=True, federated=True),
    "one_lora_alone": Kind("mola", ONE_LORA, given=True, apart=True),
    "mola_8888_alone": Kind("mola", MOLA, given=True, apart=True),
    "octavius_alone": Kind("octavius", OCTAVIUS, given=True, apart=True),
    "one_lora_then": Kind("mola", ONE_LORA, then=True),
    "one_forward_lora_then": Kind("mola", ONE_FORWARD_LORA, then=True),
    "moral_then": Kind("moral", forward_experts(), then=True),
    "loramoe_then": Kind("loramoe", forward_experts(), then=True),
}

# those tried for all, the first of which is in no name; and one more that some were tried with
RATES = ("3e-3", "1e-3")
ALL_RATES = (*RATES, "3e-4")
_NAMED = re.compile(f"_({'|'.join(ALL_RATES[1:])})(?=$|_alone$|_then$)")


def with_rate(name: str, rate: str) -> str:
    """The name of a kind with another rate: it comes before an ending."""
    return name if rate == RATES[0] else re.sub("(_alone|_then)?$", rf"_{rate}\1", name, count=1)


def without_rate(name: str) -> tuple[str, str]:
    """The name of a kind without its rate, and that."""
    found = _NAMED.search(name)
    return (_NAMED.sub("", name), found[1]) if found else (name, RATES[0])


KINDS: Mapping[str, Kind] = {
    with_rate(name, rate): kind if rate == RATES[0] else replace(kind, lr=float(rate))
    for rate in ALL_RATES
    for name, kind in _AT_3E_3.items()
}
