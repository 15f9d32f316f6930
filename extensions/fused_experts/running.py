"""Fused experts, live: a loop over the experts of a module that has all their weights in parameters of three axes.

    for each expert e that some token n reached:          (e, n) from the module's router, w_n from the mixture
        h = gate(x_n F_e + update of F_e at n)             update at n: (x_n a^T * w_n) b^T, by `Plan.at_tokens`
        y_n += score_en * (h D_e + update of D_e at n)

The gate stands between both products, so that no sum on the module's output would do: while a mixture is active that updates
some of its experts, this loop is the module's forward.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loraweave import LayerMismatch
from loraweave.extend import TargetLayer
from loraweave.extend.live import LiveModel, StandIn, give_back
from loraweave.extend.models import is_floating, multiplies_columns

# (parameter, expert, x_NI, token numbers) -> update_NO, or None if there is nothing to add
Update = Callable[[str, int, Tensor, Tensor], Tensor | None]
# the same arguments, the expert's product and the number of all tokens -> the product to use in its place
See = Callable[[str, int, Tensor, Tensor, Tensor, int], Tensor]


class Reached(NamedTuple):
    """The inputs routed to one expert: rows of the module's input, their tokens, and their scores if outputs are weighed."""

    expert: int
    row_N: Tensor
    token_N: Tensor
    score_N: Tensor | None


class ExpertsForward(StandIn):
    """A stand-in for the `forward` of a module of experts, in use while `live`, a LiveModel, has a mixture active."""

    def __init__(self, module: nn.Module, live: LiveModel | None = None) -> None:
        self.module = module
        self.live = live
        self.see: See | None = None
        self._layers: dict[tuple[str, int | None], TargetLayer] = {}
        self._own = vars(module).get("forward")
        self._forward = module.forward
        self._signature = inspect.signature(type(module).forward)
        # its look-ups cannot be traced, so that torch.compile leaves it out of its graph
        self._outside = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        module.forward = self.run  # type: ignore[method-assign]

    def add(self, layers: Iterable[TargetLayer]) -> None:
        """Let mixtures update these further experts of the module."""
        # another mapping, since other threads may be looking at this one
        self._layers = {**self._layers, **{(layer.attribute, layer.number): layer for layer in layers}}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, with the active mixture's updates if it has any, else by its own forward."""
        return (self._outside if torch.compiler.is_compiling() else self._run)(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        activation = self.mixing()
        if activation is None and self.see is None:
            return self._forward(*args, **kwargs)
        inputs = list(self._signature.bind(self.module, *args, **kwargs).arguments.values())[1:]
        x, num_tokens, reached = _reached(self.module, inputs)

        def update(parameter: str, number: int, x_NI: Tensor, token_N: Tensor) -> Tensor | None:
            layer = self._layers.get((parameter, number))
            if layer is None or activation is None:
                return None
            update_NO: Tensor | None = activation.plan.at_tokens(
                layer, x_NI, token_N, num_tokens, activation.lease, activation.usage
            )
            return update_NO

        return _sum_of_experts(self.module, x, reached, update, self.see, num_tokens)

    def mixing(self) -> Any:
        """Return the running call's activation if its mixture updates some of the experts, else None."""
        activation = None if self.live is None else self.live.current()
        if activation is None:
            return None
        reaches, lease = activation.plan.reaches, activation.lease
        return activation if any(reaches(layer.name, lease) for layer in self._layers.values()) else None

    def remove(self) -> None:
        """Give the module its own forward back; if another stand-in has replaced this one, that stays and calls this one."""
        if not give_back(self.module, "forward", self._own, self):
            self.live = None


@contextmanager
def watched(module: nn.Module, see: See) -> Iterator[None]:
    """Call `see` with every product of an expert within the block; the module then uses what `see` returns.

    Raises LayerMismatch for a module whose class computes otherwise than this file's loop.
    """
    if not computes_as_known(module):
        raise LayerMismatch(f"a {type(module).__name__} computes with its experts otherwise than those that can be watched")
    running = getattr(module.forward, "__self__", None)
    standing = running if isinstance(running, ExpertsForward) else ExpertsForward(module)
    standing.see = see
    try:
        yield
    finally:
        standing.see = None
        if standing is not running:
            standing.remove()


def _sum_of_experts(
    module: Any, x: Tensor, reached: Iterator[Reached], update: Update, see: See | None = None, num_tokens: int = 0
) -> Tensor:
    """Return the module's output for rows `x`, with `update(..)` added to both products of each expert."""
    y = torch.zeros_like(x)
    first, by_columns = ("gate_up_proj" if _gated(module) else "up_proj"), multiplies_columns(module)
    for expert, row_N, token_N, score_N in reached:

        def product(parameter: str, x_NI: Tensor, expert: int = expert, token_N: Tensor = token_N) -> Tensor:
            weight = getattr(module, parameter)[expert]
            made = x_NI @ weight if by_columns else nn.functional.linear(x_NI, weight)
            if getattr(module, "has_bias", False):
                made = made + getattr(module, f"{parameter}_bias")[expert]
            more = update(parameter, expert, x_NI, token_N)
            made = made if more is None else made + more.to(made.dtype)
            return made if see is None else see(parameter, expert, x_NI, token_N, made, num_tokens)

        hidden_NH = product(first, x[row_N])
        hidden_NH = _gate(module, hidden_NH) if _gated(module) else module.act_fn(hidden_NH)
        made_NO = product("down_proj", hidden_NH)
        if getattr(module, "has_post_expert_norm", False):
            made_NO = module.post_expert_norm(made_NO)
        made_NO = made_NO if score_N is None else made_NO * score_N[:, None]
        y.index_add_(0, row_N, made_NO.to(y.dtype))
    return y


def _reached(module: nn.Module, given: list[Any]) -> tuple[Tensor, int, Iterator[Reached]]:
    """Return (input rows, number of the call's tokens, inputs by expert) for `given`, a forward's arguments."""
    x = given[0].reshape(-1, given[0].shape[-1])
    count = int(module.down_proj.shape[0])  # type: ignore[union-attr, index]
    if len(given) == 1:
        return x, x.shape[0] // count, _not_zero(x, count)
    return x, x.shape[0], _by_scores(given[1], given[2], count)


def _by_scores(index_NK: Tensor, score_NK: Tensor, count: int) -> Iterator[Reached]:
    """Yield the inputs routed to each of `count` experts, by the K experts of each of N tokens and their scores.

    Indices outside 0 to `count` - 1, those of other processes' experts, are left out.
    """
    with torch.no_grad():
        hit = torch.unique(index_NK).tolist()
    for expert in hit:
        if 0 <= expert < count:
            token_N, place_N = torch.where(index_NK == expert)
            yield Reached(expert, token_N, token_N, score_NK[token_N, place_N])


def _not_zero(x: Tensor, count: int) -> Iterator[Reached]:
    """Yield the inputs routed to each expert in Llama 4's form: all tokens times their scores, which are 0 if not routed."""
    x_END = x.reshape(count, -1, x.shape[-1])
    for expert in range(count):
        token_N = x_END[expert].any(dim=-1).nonzero()[:, 0]
        if len(token_N):
            yield Reached(expert, token_N + expert * x_END.shape[1], token_N, None)


def _gated(module: nn.Module) -> bool:
    return bool(getattr(module, "has_gate", hasattr(module, "gate_up_proj")))


def _gate(module: Any, gate_up_NH: Tensor) -> Tensor:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up_NH)  # type: ignore[no-any-return]
    gate_NH, up_NH = gate_up_NH.chunk(2, dim=-1)
    return up_NH * module.act_fn(gate_NH)  # type: ignore[no-any-return]


_KNOWN: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()


def computes_as_known(module: nn.Module) -> bool:
    """Return True if this file's loop equals the module's forward on a few tokens; False without plain matrices."""
    weight = module._parameters.get("down_proj")
    if weight is None or weight.ndim != 3 or weight.is_meta or not is_floating(weight.dtype):
        return False
    if type(module) not in _KNOWN:
        with torch.no_grad():
            _KNOWN[type(module)] = _computes_as_known(module, weight)
    return _KNOWN[type(module)]


def _computes_as_known(module: nn.Module, weight: Tensor) -> bool:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(names) not in (1, 3):
        return False
    count, *sides = weight.shape
    size = sides[1] if multiplies_columns(module) else sides[0]
    num_rows = 3 if len(names) == 3 else 2 * count
    inputs = [torch.randn(num_rows, size, generator=torch.Generator().manual_seed(0)).to(weight)]
    if len(names) == 3:
        place_N = torch.arange(num_rows, device=weight.device)[:, None]
        inputs += [torch.cat([place_N, place_N + 1], dim=1) % count, torch.full((num_rows, 2), 0.5).to(weight)]
    try:
        expected = type(module).forward(module, *inputs)
        x, _, reached = _reached(module, inputs)
        actual = _sum_of_experts(module, x, reached, lambda *asked: None)
    except Exception:
        # a custom class may raise any error
        return False
    near = 1e-2 * float(expected.abs().max())
    return expected.shape == actual.shape and torch.allclose(expected.float(), actual.float(), rtol=1e-2, atol=near)
