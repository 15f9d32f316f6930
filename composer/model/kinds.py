"""The kinds of layers that can be composed: their modules, their size as a matrix (O, I), and the axes of their tokens."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loraweave.types import Kind

# modules with classes of linear layers that are no torch.nn.Linear: quantize_dynamic's, HQQ's, GPTQ's and AWQ's
_QUANTISED = ("torch.ao.nn.quantized.dynamic.modules.linear", "hqq.core.quantize", "gptqmodel.nn_modules.qlinear")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Shape(NamedTuple):
    """The size of a layer's weight as a matrix (O, I); `transposed` is True if it is stored as (I, O)."""

    num_outputs: int
    num_inputs: int
    transposed: bool = False
    kernel: tuple[int, ...] = ()


class LayerKind(ABC):
    """A kind of layer that computes y0 = W x, with x_BTI and y_BTO by row and token whatever axes the module's tensors have.

    All methods but `shape` need a module of the kind. The methods defined here are for features on the last axis.
    """

    name: Kind = "linear"
    modules: str

    @abstractmethod
    def shape(self, module: nn.Module) -> Shape | None:
        """Return the layer's size; None for a module that is not of this kind."""

    @abstractmethod
    def refusal(self, module: Any) -> str:
        """Return the reason, as a phrase, why adding an update to the module's output is not exact; "" if it is exact."""

    @abstractmethod
    def project(self, module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
        """Return hidden_BTS = x a^T for the module's input x, in the dtype of a or a wider one."""

    def inputs(self, module: Any, x: Tensor, like: Tensor) -> Tensor:
        """Return x_BTI, a router's input for the module's x; if values must be computed, in the dtype of `like`."""
        return by_row(x)

    def rows(self, module: Any, y: Tensor) -> Tensor:
        """Return the module's output as y_BTO, in the same memory."""
        return by_row(y)

    def put_back(self, y_BTO: Tensor, y: Tensor) -> Tensor:
        """Return y_BTO in the shape of the module's output y."""
        return y_BTO.reshape(y.shape)


class Linear(LayerKind):
    """Linear layers: torch.nn.Linear, also quantised ones, and transformers' Conv1D, which stores its weight as (I, O)."""

    modules = "torch.nn.Linear and transformers' Conv1D"

    def shape(self, module: nn.Module) -> Shape | None:
        if isinstance(module, Conv1D):
            return Shape(int(module.nf), int(module.weight.shape[0]), transposed=True)
        if isinstance(module, nn.Linear) or type(module).__module__.startswith(_QUANTISED):
            return Shape(int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        return None

    def refusal(self, module: Any) -> str:
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and not _is_plain(module):
            return "whose forward is its own, and is not W x + bias"
        return ""

    def project(self, module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
        return functional.linear(by_row(x).to(a_SI.dtype), a_SI)


class Norm(LayerKind):
    """Layer norms, which have no update of a matrix, but a trained bias where an adapter has one (peft's bias="all")."""

    modules = "torch.nn.LayerNorm"

    def shape(self, module: nn.Module) -> Shape | None:
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            return Shape(int(module.normalized_shape[0]), 0)
        return None

    def refusal(self, module: Any) -> str:
        if type(module).forward is not nn.LayerNorm.forward:
            return "whose forward is its own, and may do more than add its bias at the end"
        return ""

    def project(self, module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
        return by_row(x)[..., :0].to(a_SI.dtype)


class Embedding(LayerKind):
    """Embeddings, with or without a scale: x is the one-hot token, so that x a^T looks up a column of a."""

    name = "embedding"
    modules = "torch.nn.Embedding"

    def shape(self, module: nn.Module) -> Shape | None:
        if isinstance(module, nn.Embedding):
            return Shape(int(module.embedding_dim), int(module.num_embeddings), transposed=True)
        return None

    def refusal(self, module: Any) -> str:
        if module.max_norm is not None:
            return f"whose max_norm={module.max_norm} changes its weight at every call"
        if type(module).forward is not nn.Embedding.forward and not _looks_up_and_scales(module):
            return "whose forward is its own, and is not a look-up of its weight times its embed_scale"
        return ""

    def project(self, module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
        return _scaled(module, by_row(functional.embedding(x, a_SI.T)))

    def inputs(self, module: Any, x: Tensor, like: Tensor) -> Tensor:
        """Return the tokens as one-hot rows of vocabulary size, times the embedding's scale: as many values as logits."""
        one_hot = functional.one_hot(x.long(), int(module.num_embeddings)).to(like.dtype)
        return _scaled(module, by_row(one_hot)).to(like.dtype)


class Convolution(LayerKind):
    """Convolutions in one to three dimensions: rank rows are output channels, tokens output positions, I is C * kernel."""

    name = "conv"
    modules = "torch.nn.Conv1d, Conv2d and Conv3d"

    def shape(self, module: nn.Module) -> Shape | None:
        if isinstance(module, _CONVOLUTIONS):
            kernel = tuple(int(size) for size in module.kernel_size)
            inputs = module.in_channels // module.groups * torch.Size(kernel).numel()
            return Shape(int(module.out_channels), inputs, kernel=kernel)
        return None

    def refusal(self, module: Any) -> str:
        if module.groups > 1:
            return f"whose groups={module.groups} see different channels, so that its weight is not a single matrix"
        plain = _CONVOLUTIONS[len(module.kernel_size) - 1]
        if type(module).forward is not plain.forward or type(module)._conv_forward is not plain._conv_forward:
            return "whose forward is its own, and may do more than convolve with its weight"
        return ""

    def project(self, module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
        """Convolve x with a as the weight, with the stride, padding and dilation of the layer."""
        kernels = a_SI.reshape(-1, module.in_channels, *module.kernel_size)
        return self.rows(module, module._conv_forward(x.to(a_SI.dtype), kernels, None))

    def inputs(self, module: Any, x: Tensor, like: Tensor) -> Tensor:
        """Return the patch below the kernel at each output position, gathered by a convolution with the identity."""
        num_inputs = module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
        return self.project(module, x, torch.eye(num_inputs, dtype=like.dtype, device=like.device))

    def middle(self, module: Any, x: Tensor, like: Tensor) -> Tensor:
        """Return x_BTC, the C channels below the middle of the kernel at each output position, with the dtype of `like`."""
        kernel = torch.zeros(1, 1, *module.kernel_size, dtype=like.dtype, device=like.device)
        kernel.view(-1)[kernel.numel() // 2] = 1
        # each channel as a row of its own, as the layer pads and strides all alike
        x_BC = (x if x.ndim == 2 + len(module.kernel_size) else x[None]).to(like.dtype)
        output: Tensor = module._conv_forward(x_BC.flatten(0, 1)[:, None], kernel, None)
        return output.reshape(*x_BC.shape[:2], -1).mT

    def rows(self, module: Any, y: Tensor) -> Tensor:
        """Return the output as (rows, positions, channels); an output without a batch axis is one row."""
        return (y if y.ndim == 2 + len(module.kernel_size) else y[None]).flatten(2).mT

    def put_back(self, y_BTO: Tensor, y: Tensor) -> Tensor:
        """Return the values in the shape of y, contiguous if y is."""
        values = y_BTO.mT.reshape(y.shape)
        return values.contiguous() if y.is_contiguous() else values


linear = Linear()
norm = Norm()
embedding = Embedding()
conv = Convolution()


def by_row(tensor: Tensor) -> Tensor:
    """Return the tensor as (rows, tokens, features): features are its last axis, rows the first of two or more."""
    if tensor.ndim == 1:
        return tensor[None, None]
    # not -1, which is ambiguous for a tensor without elements
    return tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])


def is_near(y: object, expected: Tensor, *, atol: float) -> bool:
    """Return True if a module's output y is a tensor of the expected shape, within 1 % or `atol` of `expected`."""
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y.float(), expected.float(), 1e-2, atol)


def _is_plain(module: nn.Linear) -> bool:
    """Return True if a subclass's forward gives W x + bias for a random x, or if W cannot be read as a matrix."""
    weight, bias = module.weight, module.bias
    stored = weight.shape == (module.out_features, module.in_features)
    if weight.is_meta or not stored or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, module.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        y = type(module).forward(module, x)
        expected = functional.linear(x, weight, bias)
    return is_near(y, expected, atol=1e-2 * float(expected.abs().max()))


def _scaled(module: Any, looked_up: Tensor) -> Tensor:
    """Multiply looked-up rows by a scaled embedding's factor (gemma's sqrt(hidden size)), rounded as the module rounds it.

    Scaled rows are first converted to fp32 or better; without a factor they are returned unchanged.
    """
    scale = getattr(module, "embed_scale", None)
    if scale is None or type(module).forward is nn.Embedding.forward:
        return looked_up
    if isinstance(scale, Tensor):
        scale = scale.to(looked_up.device, module.weight.dtype)
    return looked_up.to(torch.promote_types(looked_up.dtype, torch.float32)) * scale


def _looks_up_and_scales(module: nn.Embedding) -> bool:
    """Return True if a subclass's forward gives embed_scale * W[token] for a few tokens.

    If the weight cannot be read (offloaded), a class with an embed_scale is assumed to do so.
    """
    weight = module.weight
    if not hasattr(module, "embed_scale") or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return False
    if weight.is_meta:
        return True
    tokens_BT = torch.arange(min(4, module.num_embeddings), device=weight.device).flip(0)[None]
    with torch.no_grad():
        try:
            y = type(module).forward(module, tokens_BT)
        # positional embeddings take other arguments, and say so in various ways
        except Exception:
            return False
        expected = _scaled(module, weight[tokens_BT])
    return is_near(y, expected, atol=1e-8)
