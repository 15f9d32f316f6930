"""The admission of rows to a server's batch: a row waits until its memory is free and its tokens would come in time."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.optimize import nnls

from loraweave import Adapter, CompositionError
from loraweave.extend import free_host_bytes
from loraweave.extend.live import Workload, costs
from loraweave.extend.models import head_size
from loraweave.extend.serving import Admission, Limits, Refusal

# the part of the free memory that a server takes unless it is told a number
FREE_SHARE = 0.75
# the calls of a layer's kernel by which the one that fills up to the largest rank may be ahead of the one that does not
SAVED_CALLS = 3
# the number of steps that are remembered, and of steps that the first guess weighs as much as
NUM_STEPS, GUESS = 256, 1.0
# the first guess of c2: an update takes the seconds of its price
COEFFICIENTS = (0.0, 0.0, 1.0)

# {(inputs, outputs) of a layer: (how many such layers, mean rank in them)}
Ranks = dict[tuple[int, int], tuple[int, int]]


class Budgets(Admission):
    """A policy that keeps a server's memory (bytes) and step times (seconds) within limits; infinite ones delay no row.

    Running rows, kept prefixes and compositions share `max_bytes`: the limit `memory_bytes`, or for 0 three quarters of what
    is free now. Running rows, and compositions that requests use or that are being made, come first. Kept prefixes and
    adapters that nobody uses make room for them, the least recently used first. An adapter counts as it was read or merged,
    in fp32, and once more if the engine keeps a copy.

    Each prompt of a row counts with the longest length of all beside it, answer included, since a batch is padded; and with
    its mixture's factors, which the batch's kernels copy. Bytes are only added up: the common budget is S-LoRA's (Sheng et
    al. 2024, arXiv 2311.03285), without its paged memory. One thread makes room; any thread may ask whether there is.
    """

    def __init__(self, model: Any, limits: Limits, prefixes: Any, experts: Any, step_times: StepTimes | None = None) -> None:
        self._limits = limits
        self._prefixes, self._experts = prefixes, experts
        config = model.config.get_text_config()
        size = head_size(config)
        if size is None and 0 < limits.memory_bytes < math.inf:
            raise CompositionError(
                "memory_bytes needs a model whose config has the number and the size of its attention heads"
            )
        self.max_bytes, self.token_bytes = math.inf, 0
        if size is not None:
            self.max_bytes = limits.memory_bytes or FREE_SHARE * free_bytes(model)
            kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            self.token_bytes = int(2 * config.num_hidden_layers * kv_heads * size * model.dtype.itemsize)
        # by composition: the numbers of values that members' kernels copy, and of its adapters' layers
        self._sizes: WeakKeyDictionary[Any, tuple[list[int], int]] = WeakKeyDictionary()
        # the number of values whose copy costs what a kernel's call does
        rates = Workload(*6 * (1,), itemsize=model.dtype.itemsize, device=model.device.type).rates
        self._call_values = math.ceil(rates.s_per_call / rates.s_per_byte / model.dtype.itemsize)
        self._step_times: StepTimes | None = None
        if limits.token_seconds < math.inf:
            self._step_times = step_times or StepTimes(model.dtype.itemsize, model.device.type)
        self.clock = self._step_times.clock if self._step_times else time.perf_counter
        self.lets_pass = self._step_times is not None

    def figures(self, running: Callable[[], Sequence[Any]]) -> dict[str, Callable[[], int]]:
        return {
            "expert_bytes": lambda: sum(self._experts.loaded_sizes(merges=False)),
            "merge_bytes": lambda: sum(self._experts.loaded_sizes(merges=True)),
            "row_bytes": lambda: self.of_batch(running()),
            "making_bytes": lambda: int(self.reserved),
            "merges": lambda: len(self._experts.loaded_sizes(merges=True)),
            "prefixes": lambda: self._prefixes.num_kept,
        }

    def require_possible(self, row: Any) -> None:
        num_bytes = self.of_batch([row]) + int(self._experts.bytes_of(row.served.all_adapters.values()))
        self._require("the answer and its adapters", num_bytes)

    def require_loadable(self, num_bytes: int, num_tokens: int) -> None:
        self._require("the composition and its answer", num_bytes + num_tokens * self.token_bytes)

    def _require(self, what: str, num_bytes: float) -> None:
        """Raise Refusal (413) if `what` needs more than there is in all."""
        if num_bytes > self.max_bytes:
            raise Refusal(
                413,
                f"{what} need up to {num_bytes:.0f} bytes, and this server has {self.max_bytes:.0f}; ask for fewer "
                "max_tokens or adapters, or start it with more --memory-bytes",
                code="memory_exceeded",
            )

    def needed(self, rows: Sequence[Any]) -> int:
        """Return the bytes of these rows, of their adapters and all others in use, and those reserved."""
        return self.of_batch(rows) + int(self._experts.used_bytes(rows)) + self.reserved

    def of_batch(self, rows: Sequence[Any]) -> int:
        """Return the most bytes that exist while these rows run, and no longer: keys and values, and what kernels copy."""
        return self._states(rows) + self._kernels(rows)

    def _states(self, rows: Sequence[Any]) -> int:
        """Return the bytes of the keys and values of these rows in one batch, each at the longest length."""
        return sum(len(row.prompts) for row in rows) * max((row.longest for row in rows), default=0) * self.token_bytes

    def _kernels(self, rows: Sequence[Any]) -> int:
        """Return the most bytes that the engine's kernels take for a batch of these rows, and for those of their routers.

        Kernels copy factors, once for each prompt at most; one fills them up to the largest rank, and one multiplies them
        out, where that saves more calls than it costs.
        """
        routed: dict[str, int] = {}
        sizes: list[int] = []
        num_layers = 0
        for row in rows:
            copied, layers = self._copied(row.served)
            if row.served.router is not None:
                routed[row.served.identity] = sum(copied)
            else:
                sizes += filter(None, copied)
                num_layers += layers
        largest = max(sizes, default=0)
        filled = len(sizes) * min(largest, num_layers * SAVED_CALLS * self._call_values)
        num_values: int = min(len(sizes) * largest, sum(sizes) + filled) + sum(routed.values())
        return num_values * int(self._experts.copied_bytes)

    def _copied(self, served: Any) -> tuple[list[int], int]:
        """Return the most values that a kernel copies for each member of a composition, and the layers of all adapters."""
        if served not in self._sizes:
            sizes = []
            for member in served.members:
                # of each layer, the values of the factors and of their product
                few: Counter[str] = Counter()
                full: dict[str, int] = {}
                for adapter in member.adapters.values():
                    for layer, factors in adapter.layers.items():
                        few[layer] += sum(tensor.numel() for tensor in factors.tensors().values())
                        full[layer] = factors.a_RI.shape[1] * factors.b_OR.shape[0]
                sizes.append(
                    sum(max(few[layer], size * (size <= few[layer] + self._call_values)) for layer, size in full.items())
                )
            self._sizes[served] = sizes, sum(len(adapter.layers) for adapter in served.all_adapters.values())
        return self._sizes[served]

    def has_room(self, rows: Sequence[Any], num_bytes: int = 0) -> bool:
        return self.max_bytes == math.inf or self.needed(rows) + num_bytes <= self.max_bytes

    def make_room(self, rows: Sequence[Any]) -> None:
        if self.max_bytes == math.inf:
            # nothing is added up at each step of a server without a limit
            return
        spare = self.max_bytes - self.needed(rows)
        while True:
            unused = self._experts.unused().values()
            adapter, prefix = min((loaded.last_use for loaded in unused), default=math.inf), self._prefixes.oldest
            num_kept = self._prefixes.kept_bytes + sum(loaded.size for loaded in unused)
            if num_kept <= spare or adapter == prefix == math.inf:
                return
            (self._experts if adapter < prefix else self._prefixes).drop_oldest()

    def is_quick(self, rows: Sequence[Any]) -> bool:
        return self._step_times is None or self._step_times.predict(rows) <= self._limits.token_seconds

    def saw(self, rows: Sequence[Any], seconds: float) -> None:
        if self._step_times is not None:
            self._step_times.saw(rows, seconds)


def free_bytes(model: Any) -> float:
    """Return how many bytes are free where the model is, within a container's limit; infinity if that is not known."""
    if model.device.type == "cuda":
        return float(torch.cuda.mem_get_info(model.device)[0])
    free = free_host_bytes()
    return math.inf if free is None else free


class StepTimes:
    """A predictor of the seconds of a decoding step, fitted to the last steps, for a device type and an item size in bytes.

    One thread uses it.

        seconds = c0 + c1 * prompts + c2 * a        a: the updates' seconds by composer/live/kernels/_parts.py

    c0, c1 and c2 are fitted to the last steps. The cost a depends on the ranks and on the kernel that would run them: one
    pads all rows to the largest rank, another gives each its own. CaraServe (Li et al. 2024, arXiv 2401.11240) fits two
    such lines, one for each kind of kernel, and chooses among servers by them; here one server admits.
    """

    def __init__(self, itemsize: int, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._itemsize = itemsize
        self._device = device
        self._ranks: WeakKeyDictionary[Adapter, Ranks] = WeakKeyDictionary()
        self._steps: deque[tuple[tuple[float, float, float], float]] = deque(maxlen=NUM_STEPS)
        self._fitted: np.ndarray | None = None

    def saw(self, rows: Sequence[Any], seconds: float) -> None:
        """Remember that a step of these rows took `seconds`."""
        self._steps.append((self._features(rows), seconds))
        self._fitted = None

    def predict(self, rows: Sequence[Any]) -> float:
        """Return the seconds of a step of these rows; 0 before any step was seen."""
        if not self._steps:
            return 0.0
        if self._fitted is None:
            self._fitted = self._fit()
        return float(np.array(self._features(rows)) @ self._fitted)

    def _fit(self) -> np.ndarray:
        """Fit c0, c1 and c2, none of them negative."""
        features_SF = np.array([features for features, _ in self._steps])
        seconds_S = np.array([seconds for _, seconds in self._steps])
        size_F = np.maximum(features_SF.max(axis=0), 1e-9)
        # with features scaled to at most 1, the guess weighs as much as GUESS steps
        guess_F = np.array(COEFFICIENTS) * size_F
        scaled_SF = np.vstack([features_SF / size_F, GUESS * np.eye(3)])
        found_F, _ = nnls(scaled_SF, np.concatenate([seconds_S, GUESS * guess_F]))
        return np.asarray(found_F / size_F)

    def _features(self, rows: Sequence[Any]) -> tuple[float, float, float]:
        return 1.0, float(sum(len(row.prompts) for row in rows)), self._updates(rows)

    def _updates(self, rows: Sequence[Any]) -> float:
        """Return the seconds that the cost model predicts for adapters' updates of one token in each prompt of the rows."""
        lines = [tuple(member.adapters.items()) for row in rows for member in row.served.members if member.adapters]
        ranks = {content: self._ranks_of(adapter) for line in lines for content, adapter in line}
        shapes = {shape for by_shape in ranks.values() for shape in by_shape}
        total = 0.0
        for shape in shapes:
            sums = [sum(ranks[content].get(shape, (0, 0))[1] for content, _ in line) for line in lines]
            distinct = {tuple(content for content, _ in line): rank for line, rank in zip(lines, sums, strict=True)}
            work = Workload(
                num_mixtures=len(lines),
                largest=max(sums),
                total=sum(sums),
                num_segments=len(distinct),
                distinct=sum(distinct.values()),
                stacked=sum(by_shape.get(shape, (0, 0))[1] for by_shape in ranks.values()),
                num_inputs=shape[0],
                num_outputs=shape[1],
                itemsize=self._itemsize,
                device=self._device,
            )
            total += max(by_shape.get(shape, (0, 0))[0] for by_shape in ranks.values()) * cheapest(work)
        return total

    def _ranks_of(self, adapter: Adapter) -> Ranks:
        if adapter not in self._ranks:
            ranks: dict[tuple[int, int], list[int]] = defaultdict(list)
            for factors in adapter.layers.values():
                ranks[factors.a_RI.shape[1], factors.b_OR.shape[0]].append(factors.a_RI.shape[0])
            self._ranks[adapter] = {
                shape: (len(shape_ranks), round(sum(shape_ranks) / len(shape_ranks))) for shape, shape_ranks in ranks.items()
            }
        return self._ranks[adapter]


@lru_cache(maxsize=4096)
def cheapest(work: Workload) -> float:
    """Return the predicted seconds of the cheapest compute kernel for this workload."""
    return min(work.rates.seconds(cost) for cost in costs(work).values())
