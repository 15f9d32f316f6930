"""Outputs that no bit of other rows in the batch changes: every sum of a forward pass runs over a fixed shape.

A matrix product adds up in an order that its library chooses by the shape, so that a row of 8 differs in its last bits from
the same row alone. Within `batch_invariant` the shapes are the same whatever the batch is:

    linear       x_NI, padded to whole tiles of TILE tokens      each tile apart: (TILE, I) times (I, O), O >= TILE
    attention    the keys that a row sees, without its padding   each tile of KEYS keys apart: (TILE, D) times (D, KEYS),
                                                                 exp against the maximum of all, sums tile after tile
    mixture      a row's experts one after the other             `kernels/fixed_shape.py`: (TILE, I) times (I, R)
    exp, SiLU..  by whole vectors of LANES elements              what is left of a vector has another exp

Zeros that fill a tile up add nothing, and the place of a token within a tile does not matter, nor how many tokens come at
once: a token read after a cache has the bits that it has in a whole prompt. Products by other functions of torch are refused
by name. The idea is that of batch-invariant kernels (Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025),
which vLLM has for GPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from loraweave import CompositionError, ScopeError
from loraweave.extend.live import only_kernel

TILE = 8
KEYS = 64
# the number of inputs that a library's vectors take at once, or a multiple of that, in any dtype
VECTOR = 16
# the number of elements that torch's vectorised loops take at once, or a multiple of that, in any dtype
LANES = 64
# below torch's grain of 2^15 elements: longer loops are split anywhere between threads
PIECE = 2**15 - LANES

ELEMENTWISE = "exp sigmoid tanh sin cos erf log log1p expm1"

_FIXED: ContextVar[bool] = ContextVar("loraweave_fixed_shapes", default=False)


def batch_invariant(model: nn.Module) -> AbstractContextManager[None]:
    """Fix all shapes within the block: no bit of a row's outputs depends on other rows, their mixtures, padding or a cache.

    It applies to calls of the model in this thread, and to activations that are opened inside. `model` is a transformers
    model whose attention is "sdpa", on a CPU, in any floating dtype; mixtures have a weight for each row. The number of
    threads (`torch.set_num_threads`) must stay the same, since another may round in another way. Raises CompositionError for
    a model whose products it cannot fix; a call inside raises ScopeError for any other kind of product, which it names, and
    for a mixture whose weights are per token.
    """
    return only_kernel("fixed_shape", model)


@contextmanager
def fixing(model: nn.Module) -> Iterator[None]:
    """Fix the shapes of the model's matrix products within the block; raise CompositionError if some cannot be fixed."""
    _require_sound(model)
    running = ExitStack()

    def begin(*call: Any) -> None:
        # the hooks are the model's, and other threads call it, too
        if _FIXED.get():
            running.enter_context(_FixedShapes())

    def end(*call: Any) -> None:
        running.close()

    token = _FIXED.set(True)
    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        # an exception can skip the forward hook
        running.close()
        _FIXED.reset(token)


def _require_sound(model: nn.Module) -> None:
    kind = type(model).__name__
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        raise CompositionError(
            f"batch_invariant() knows attention as 'sdpa', and that of {kind} is {attention!r}: load the model with "
            "attn_implementation='sdpa'"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise CompositionError(
            f"{kind} attends within a window of {window} tokens, whose beginning batch_invariant() cannot tell from padding"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise CompositionError(
                f"parameter {name!r} is on {parameter.device}; batch_invariant() fixes what a CPU does: vLLM has it for GPUs"
            )
        if parameter.ndim == 3 and (product := getattr(config, "_experts_implementation", None)) not in (None, "eager"):
            raise CompositionError(
                f"parameter {name!r} has experts that {kind} multiplies by {product!r}, whose sums depend on the batch: "
                "load the model with experts_implementation='eager'"
            )
        if not parameter.is_floating_point():
            raise CompositionError(f"parameter {name!r} is {parameter.dtype}; batch_invariant() takes no quantised base")


class _FixedShapes(TorchFunctionMode):
    """The torch mode in which matrix products have fixed shapes; one whose shape cannot be fixed raises ScopeError."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _HANDLERS.get(func, func)(*args, **(kwargs or {}))


def fixed_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x W^T + b for x of any leading axes, calculated in tiles of TILE tokens."""
    num_outputs = weight_OI.shape[0]
    x, weight_OI = _with_inputs(x), _with_inputs(_with_outputs(weight_OI))
    if bias_O is not None and num_outputs < TILE:
        bias_O = pad(bias_O, (0, TILE - num_outputs))
    x_NI = x.reshape(-1, x.shape[-1])
    filled_NI = pad(x_NI, (0, 0, 0, -len(x_NI) % TILE)).contiguous()
    tiles = [functional.linear(tile, weight_OI, bias_O) for tile in torch.split(filled_NI, TILE)]
    y_NO = (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[: len(x_NI), :num_outputs]
    return y_NO.reshape(*x.shape[:-1], num_outputs)


def fixed_products(x_MTI: Tensor, weight_MOI: Tensor) -> Tensor:
    """Return x W^T (M, T, O) for each of M pairs of matrices; T, at most TILE, is padded to TILE in the product.

    It also runs where the model's own batched products are refused.
    """
    num_tokens = x_MTI.shape[1]
    with torch._C.DisableTorchFunction():
        return _products(pad(x_MTI, (0, 0, 0, TILE - num_tokens)), weight_MOI)[:, :num_tokens]


def fixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(q k^T * scale) v over the keys that the mask allows, calculated in fp32 or better.

    It has the arguments of `scaled_dot_product_attention`; query, key and value are (rows, heads, positions, head size).
    Raises ScopeError for dropout, biases by position or a mask by head.
    """
    if dropout_p:
        raise ScopeError("attention drops values at random: call model.eval() before batch_invariant()")
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    num_rows, num_heads, num_queries, size = query.shape
    allowed_BQK = _allowed(attn_mask, is_causal, num_rows, num_queries, key.shape[2])
    exact = torch.promote_types(query.dtype, torch.float32)
    places_BK, allowed_BQK = _own_keys(allowed_BQK)
    places = torch.arange(num_rows)[:, None], places_BK
    key_BHKD, value_BHKD = (states.to(exact).transpose(1, 2)[places].transpose(1, 2) for states in (key, value))
    scaled = query.to(exact) * (size**-0.5 if scale is None else scale)
    queries = pad(scaled, (0, 0, 0, -num_queries % TILE))
    allowed_BQK = pad(allowed_BQK, (0, 0, 0, -num_queries % TILE))
    num_tiles = queries.shape[2] // TILE
    q_NTD = queries.reshape(-1, TILE, size)

    def by_tile(states: Tensor) -> Tensor:
        """Return, for each tile of queries, the `states` (keys or values) of its batch row and head."""
        return states[:, :, None].expand(-1, -1, num_tiles, -1, -1).reshape(len(q_NTD), *states.shape[2:])

    blocked = ~allowed_BQK.reshape(num_rows, 1, num_tiles, TILE, -1).expand(-1, num_heads, -1, -1, -1).reshape(
        len(q_NTD), TILE, -1
    )
    scores = [
        _products(q_NTD, by_tile(keys)).masked_fill(block, -torch.inf)
        for keys, block in zip(torch.split(key_BHKD, KEYS, dim=2), torch.split(blocked, KEYS, dim=2), strict=True)
    ]
    largest = torch.stack([score_NTK.amax(dim=2, keepdim=True) for score_NTK in scores]).amax(dim=0)
    # queries of padding, and those that fill a tile up, may see nothing
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    total, mixed = torch.zeros_like(largest), torch.zeros_like(q_NTD[..., :1]).expand(-1, -1, value.shape[3]).clone()
    for score_NTK, values in zip(scores, torch.split(value_BHKD.mT, KEYS, dim=3), strict=True):
        weights = _by_vectors(torch.exp)(score_NTK - largest)
        total += weights.sum(dim=2, keepdim=True)
        mixed += _products(weights, by_tile(values))
    output_BHQD = (mixed / total.clamp_(min=torch.finfo(exact).tiny)).reshape(num_rows, num_heads, -1, value.shape[3])
    return output_BHQD[:, :, :num_queries].to(query.dtype)


def _products(x_NTI: Tensor, weight_NOI: Tensor) -> Tensor:
    """Return x W^T (N, T, O) for each of N pairs of matrices.

    They are never multiplied singly, nor with W in another memory layout: the library would add up in another order.
    """
    if len(x_NTI) == 1:
        return _products(x_NTI.repeat(2, 1, 1), weight_NOI.repeat(2, 1, 1))[:1]
    wide_NOI = _with_inputs(_with_outputs(weight_NOI)).contiguous()
    return torch.bmm(_with_inputs(x_NTI), wide_NOI.mT)[..., : weight_NOI.shape[1]]


def _by_vectors(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that runs the elementwise `func` on whole vectors of LANES elements, in one thread."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        alone = x.numel() <= PIECE or torch.get_num_threads() == 1
        if not x.ndim or (x.shape[-1] % LANES == 0 and alone and x.is_contiguous()):
            return func(x, *args, **kwargs)
        filled = pad(x, (0, -x.shape[-1] % LANES)).contiguous()
        output = torch.cat([func(piece, *args, **kwargs) for piece in torch.split(filled.view(-1), PIECE)])
        return output.view_as(filled)[..., : x.shape[-1]]

    return call


def _fixed_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right if the inner dimension is 1, so that nothing is summed; else raise ScopeError."""
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != 1:
        _refuse("torch.matmul")
    return left * right


def _refuse(name: str, /, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise ScopeError for a call of the function of this name."""
    raise ScopeError(
        f"the model calls {name}, whose sums depend on the batch: within batch_invariant() products must be those of "
        "torch.nn.Linear, and attention must be 'sdpa'"
    )


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: fixed_linear,
    functional.scaled_dot_product_attention: fixed_attention,
    torch.addmm: lambda bias_O, x_NI, weight_IO: fixed_linear(x_NI, weight_IO.T, bias_O),
    torch.matmul: _fixed_matmul,
    Tensor.matmul: _fixed_matmul,
    Tensor.__matmul__: _fixed_matmul,
    **{
        getattr(place, name): _by_vectors(getattr(place, name))
        for place, names in ((torch, ELEMENTWISE), (Tensor, ELEMENTWISE), (functional, "silu gelu softplus mish elu"))
        for name in names.split()
    },
    **{
        getattr(place, name): partial(_refuse, f"{shown}.{name}")
        for place, shown, names in (
            (torch, "torch", "bmm baddbmm addbmm mm mv addmv dot vdot inner tensordot einsum chain_matmul cdist"),
            (torch, "torch", "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d lstm gru"),
            (Tensor, "torch.Tensor", "bmm baddbmm addbmm addmm mm mv addmv dot inner addmm_ baddbmm_ addbmm_ addmv_"),
            (functional, "torch.nn.functional", "multi_head_attention_forward bilinear"),
        )
        for name in names.split()
    },
}


def _with_outputs(weight: Tensor) -> Tensor:
    """Return W (.., O, I) padded with zeros to TILE outputs; else sums would depend on a token's position in a tile."""
    missing = TILE - weight.shape[-2]
    return pad(weight, (0, 0, 0, missing)) if missing > 0 else weight


def _with_inputs(x: Tensor) -> Tensor:
    """Return x or a weight (.., I) with I padded with zeros to a multiple of VECTOR.

    Else each row begins at another offset in a vector, and some rows are summed in another order if there are few outputs.
    """
    missing = -x.shape[-1] % VECTOR
    return pad(x, (0, missing)) if missing else x


def _allowed(mask: Tensor | None, is_causal: bool, num_rows: int, num_queries: int, num_keys: int) -> Tensor:
    """Return True where a query sees a key, as (B, Q, K); raise ScopeError for a mask by head or one with other biases."""
    if mask is None:
        every = torch.ones(num_queries, num_keys, dtype=torch.bool)
        return (every.tril() if is_causal else every).expand(num_rows, -1, -1)
    if mask.dtype is not torch.bool:
        lowest = torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            raise ScopeError("the attention has biases by position, which batch_invariant() does not know")
        mask = mask == 0
    if mask.ndim == 4:
        if mask.shape[1] != 1:
            raise ScopeError("the attention has a mask for each head, which batch_invariant() does not know")
        mask = mask[:, 0]
    return mask.expand(num_rows, num_queries, num_keys)


def _own_keys(allowed_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions (B, K) of the keys that each row's last query sees, and allowed_BQK for these keys.

    The positions ascend and are padded to whole tiles of KEYS, with False in the mask.
    """
    last_BK = allowed_BQK[:, -1]
    counts_B = last_BK.sum(dim=1)
    size = -(-int(counts_B.max()) // KEYS) * KEYS or KEYS
    places_BK = torch.argsort(~last_BK, dim=1, stable=True)[:, :size]
    places_BK = pad(places_BK, (0, size - places_BK.shape[1]))
    own_BK = torch.arange(size) < counts_B[:, None]
    among_BQK = allowed_BQK.gather(2, places_BK[:, None].expand(-1, allowed_BQK.shape[1], -1))
    return places_BK, among_BQK & own_BK[:, None]
