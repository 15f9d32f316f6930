"""The target layers of a model: modules of a known kind, each seen as one weight (O, I) whatever its storage.

`use_of` finds layers whose weight is read without a call: a hook on such a layer never fires, and an update would be lost
without an error. It reads the bytecode of the owner's methods, which is quick and works without their source.
"""

import difflib
import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from types import CodeType
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraweave.composer.model.kinds import LayerKind, conv, embedding, linear, norm
from loraweave.errors import CompositionError, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.hub.base_layer import expert_matrix
from loraweave.lowrank import algebra
from loraweave.types import Factors

# forwards that are known to return new memory
FRESH = (nn.Linear.forward, Conv1D.forward)

KINDS: tuple[LayerKind, ...] = (linear, embedding, conv)


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """A layer under its module path; `transposed` is True if its weight is stored as (I, O).

    `fresh` is True if every call's output is a new tensor, which nothing else refers to. `owner` is the module around it if
    that module may use the layer's weight without calling the layer, else None. An expert of a fused parameter is the matrix
    `number` of the module's parameter `attribute`; any other layer has its weight in "weight". With `turned` the module
    multiplies that matrix from the other side than its sizes here say, as PEFT stores Llama 4's: then x has as many features
    as the layer has outputs.
    """

    name: str
    module: nn.Module
    num_outputs: int
    num_inputs: int
    transposed: bool
    kind: LayerKind = linear
    fresh: bool = False
    owner: nn.Module | None = None
    attribute: str = "weight"
    number: int | None = None
    turned: bool = False

    @property
    def path(self) -> str:
        """The module's path in the model."""
        return self.name if self.number is None else self.name.rsplit(".", 2)[0]

    def key(self, part: str) -> str:
        """Return the module's name for the parameter that holds the layer's "weight" or "bias"."""
        return self.attribute if part == "weight" else part

    def parameter(self, part: str) -> Tensor | None:
        """Return the tensor "weight" or "bias" as it is now; None if the layer has none, or computes it in each call."""
        if self.number is not None:
            whole = self.module._parameters.get(self.attribute) if part == "weight" else None
            return None if whole is None else whole.detach()[self.number]
        value = getattr(self.module, part, None)
        # torch's quantised layers have methods of these names
        value = value() if inspect.ismethod(value) else value
        return value if isinstance(value, Tensor) else None

    @property
    def offloaded(self) -> bool:
        """True if accelerate keeps the layer's values elsewhere, and loads them when the layer runs."""
        weight = self.parameter("weight")
        return weight is not None and weight.is_meta and hasattr(self.module, "_hf_hook")

    def dense_weight_OI(self) -> Tensor:
        """Return the weight as (O, I). Raises CompositionError if it is not a plain matrix (quantised, packed, meta)."""
        weight = self.parameter("weight")
        stored = (self.num_inputs, self.num_outputs) if self.transposed else (self.num_outputs, self.num_inputs)
        plain = weight is not None and not weight.is_meta and is_floating(weight.dtype) and weight.ndim > 1
        # a quantised tensor may report a floating-point dtype
        plain = plain and weight is not None and type(weight.data) is Tensor
        if weight is None or not plain or tuple(weight.flatten(1).shape) != stored:
            what = "no tensor" if weight is None else f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
            what = what if weight is None or type(weight.data) is Tensor else f"a {type(weight.data).__name__} of {what}"
            raise CompositionError(
                f"the weight of layer {self.name!r} ({type(self.module).__name__}) is {what}, not a matrix of "
                f"floating point numbers {stored}; activate() plain LoRA adapters on it, or load the model unquantised"
            )
        return weight.T if self.transposed else weight.flatten(1)


# the modules into whose weights a mixture is fused at present
OVERWRITTEN: WeakSet[nn.Module] = WeakSet()


def row_sums(tensor: Tensor) -> Tensor:
    """Return the sum of each row's bytes, read as integers of 8, 4 or 2 bytes, to detect changes."""
    whole = tensor.detach().contiguous()
    whole = whole.flatten(1) if whole.ndim > 2 else whole
    offset, row = (count * whole.element_size() for count in (whole.storage_offset(), whole.shape[-1]))
    word = next(word for word in _WORDS if offset % word.itemsize == 0 and row % word.itemsize == 0)
    return whole.view(word).sum(dim=-1, dtype=torch.int64)


_WORDS = (torch.int64, torch.int32, torch.int16)


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """Return {"quantization": the model's `quantization_config` as JSON} for a card; {} for a model that is not quantised.

    For a model quantised after loading, which has no config, the type of its first quantised weight is named instead.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None and not getattr(config, "dequantize", False):
        return {"quantization": dict(config) if isinstance(config, Mapping) else config.to_dict()}
    types = (type(parameter.data) for parameter in model.parameters())
    first = next((kind.__name__ for kind in types if kind is not Tensor), None)
    return {} if first is None else {"quantization": {"quant_method": first}}


def is_floating(dtype: torch.dtype) -> bool:
    """Return True for floating-point dtypes of 16 bits or more, in which products can be computed."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def gives_new_memory(module: nn.Module) -> bool:
    """Return True if every output of the module is a new tensor, which nothing else refers to."""
    return type(module).forward in FRESH and "forward" not in vars(module)


def target_layer(modules: Mapping[str, nn.Module], name: str, factors: Factors, expert: str) -> TargetLayer:
    """Return the layer that `factors` update; `modules` is the model's named_modules(), `expert` a name for messages.

    Raises LayerMismatch, naming expert and layer, for a layer that is missing, of an unknown kind, of another kind or shape
    than the factors, never run, or whose forward does more than apply its weight; CompositionError for a layer on the meta
    device.
    """
    module = modules.get(name.rsplit(".", 2)[0] if factors.kind == "expert" else name)
    statement = f"expert {expert!r} updates layer {name!r}"
    if module is None:
        raise LayerMismatch(f"{statement}, which the model does not have{_hint(modules, name)}")
    what = type(module).__name__
    if factors.kind == "expert":
        return _expert_layer(modules, name, factors, expert)
    # a trained bias alone, stored without the layer's kind and number of inputs
    bias_alone = factors.rank == 0 and factors.a_RI.shape[1] == 0
    kinds = (*KINDS, norm) if bias_alone else KINDS
    for kind in kinds:
        if (shape := kind.shape(module)) is not None:
            break
    else:
        known = "; ".join(f"{known_kind.modules} ({known_kind.name})" for known_kind in KINDS)
        raise LayerMismatch(f"{statement}, which is a {what}{_bare(module)}; what can be composed is {known}")
    if factors.kind != kind.name and not bias_alone:
        raise LayerMismatch(
            f"{statement} with factors of kind {factors.kind!r}, but a {what} takes kind {kind.name!r}; was the adapter "
            "made for another base model?"
        )
    if why := kind.refusal(module):
        raise LayerMismatch(f"{statement} ({what}), {why}; take an adapter that leaves this layer alone")
    factor_shape = (int(factors.b_OR.shape[0]), int(factors.a_RI.shape[1]), factors.kernel)
    wanted = (shape.num_outputs, shape.num_inputs, shape.kernel)
    if factor_shape != wanted and not (bias_alone and factor_shape[0] == wanted[0]):
        form, sizes = ("(O, I, kernel)", 3) if shape.kernel or factors.kernel else ("(O, I)", 2)
        raise LayerMismatch(
            f"{statement} with shape {form} = {factor_shape[:sizes]}, but the model's {what} has {wanted[:sizes]}"
        )
    if _is_never_called(modules, name):
        raise LayerMismatch(
            f"{statement}, whose weight the encoder and the decoder read through embeddings of their own, so that it never "
            "runs: give its factors to 'encoder.embed_tokens' and 'decoder.embed_tokens' beside it"
        )
    place, _, attribute = name.rpartition(".")
    owner = modules.get(place)
    if owner is not None and (use_of(owner, attribute) != "both" or _embeds_tokens(owner, module)):
        owner = None
    layer = TargetLayer(
        name, module, shape.num_outputs, shape.num_inputs, shape.transposed, kind, gives_new_memory(module), owner
    )
    weight = layer.parameter("weight")
    if weight is not None and weight.is_meta and not layer.offloaded:
        raise CompositionError(
            f"{statement}, whose weight is on the meta device and has no values: load the model's weights first"
        )
    return layer


def _expert_layer(modules: Mapping[str, nn.Module], name: str, factors: Factors, expert: str) -> TargetLayer:
    """Return one expert of a fused parameter as a layer. Raises what `target_layer` raises."""
    if not factors.is_product:
        raise LayerMismatch(f"expert {expert!r} has a gain or a bias for layer {name!r}, an expert of a fused parameter")
    matrix = expert_matrix(modules, name, factors, f"expert {expert!r}")
    sizes = matrix.num_outputs, matrix.num_inputs, matrix.transposed
    turned = multiplies_columns(matrix.module) != matrix.transposed
    layer = TargetLayer(name, matrix.module, *sizes, attribute=matrix.parameter, number=matrix.number, turned=turned)
    weight = layer.parameter("weight")
    if weight is None or weight.is_meta:
        raise CompositionError(
            f"expert {expert!r} updates layer {name!r}, whose weight is on the meta device: load it where it runs, without "
            "offloading"
        )
    return layer


def multiplies_columns(module: nn.Module) -> bool:
    """Return True if a module of fused experts computes x W with matrices (I, O), as gpt-oss and Llama 4 do, not x W^T."""
    return bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))


def _embeds_tokens(owner: nn.Module, module: nn.Module) -> bool:
    """Return True if the module is the owner's token embedding, which a call with inputs_embeds does not run."""
    return isinstance(module, nn.Embedding) and getattr(owner, "get_input_embeddings", lambda: None)() is module


def _is_never_called(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return True for an encoder-decoder's `shared` embedding, which since transformers 5 only holds the weight."""
    place, _, last = name.rpartition(".")
    prefix = f"{place}." if place else ""
    encoder_embedding = modules.get(f"{prefix}encoder.embed_tokens")
    return last == "shared" and encoder_embedding is not None and encoder_embedding is not modules[name]


def _hint(modules: Mapping[str, nn.Module], name: str) -> str:
    """Return a phrase that suggests what was meant by a missing layer `name`: a like path, or fused experts; "" for none."""
    with suppress(AttributeError, KeyError):
        module = modules[""].get_submodule(name)
        first = next(place for place, other in modules.items() if other is module)
        return f" under this name: it is {first!r}, which has two places in the model, so give the update to that one"
    if ".experts." in name:
        parent = name
        while parent and parent not in modules:
            parent = parent.rpartition(".")[0]
        for place, module in modules.items():
            if f"{place}.".startswith(f"{parent}.") and (bare := _bare(module)):
                return f"; {place!r} is a {type(module).__name__}{bare}"
    close = difflib.get_close_matches(name, modules, n=1)
    return f"; the nearest is {close[0]!r}" if close else ""


def _bare(module: nn.Module) -> str:
    """Return a phrase for a module that has the weights of many experts in one parameter; "" for any other."""
    stacked = [part for part, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    if not stacked:
        return ""
    return (
        f", which has the weights of all its experts in {' and '.join(map(repr, stacked))}: merge the adapter into the "
        "model with peft and load that as the base, or take one that leaves these experts alone"
    )


def require_values(name: str, adapter: Adapter, layers: Mapping[str, TargetLayer]) -> None:
    """Raise CompositionError, naming the expert, if its factors need values of the base in an offloaded layer."""
    for layer in layers.values():
        factors = adapter.layers.get(layer.name)
        if factors is None or not layer.offloaded:
            continue
        if not factors.bound or (factors.gain_O is not None and layer.parameter("bias") is not None):
            raise CompositionError(
                f"expert {name!r} has a gain (DoRA, (IA)3) or a trained bias for layer {layer.name!r}, which needs the "
                "base's own parameters, but these are offloaded; give the layer a device of its own in device_map"
            )


def bind(adapter: Adapter, layers: Mapping[str, TargetLayer]) -> Mapping[str, Factors]:
    """Return the adapter's factors with values that depend on the base resolved (DoRA's magnitude, a trained bias).

    A layer with a bias alone gets the base layer's kind and number of inputs.
    """
    factors = dict(adapter.layers)
    for name, part in factors.items():
        layer = layers[name]
        if part.rank == 0 and part.a_RI.shape[1] == 0:
            shape = layer.kind.shape(layer.module)
            assert shape is not None
            part = replace(part, a_RI=part.a_RI.new_zeros(0, shape.num_inputs), kind=layer.kind.name, kernel=shape.kernel)
            factors[name] = part
        if not part.bound:
            with torch.inference_mode(False), torch.no_grad():
                # only DoRA needs the weight, which may be quantised
                weight_OI = torch.zeros(0) if part.magnitude_O is None else layer.dense_weight_OI().cpu()
                moved: dict[str, Any] = {name: tensor.cpu() for name, tensor in part.tensors().items()}
                bias_O = layer.parameter("bias")
                bias_O = None if bias_O is None else bias_O.detach().cpu()
                factors[name] = algebra.bind(replace(part, **moved), weight_OI, bias_O)
    return factors


def with_magnitudes(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return the adapter as files store it: if a layer has a gain, with DoRA's magnitudes in all its layers.

    Raises AdapterUnsupported for a gain that no magnitude expresses.
    """
    if all(part.gain_O is None for part in adapter.layers.values()):
        return adapter
    modules = dict(model.named_modules())
    with torch.inference_mode(False), torch.no_grad():
        layers = {
            name: algebra.unbind(part, target_layer(modules, name, part, adapter.name).dense_weight_OI().cpu())
            for name, part in adapter.layers.items()
        }
    return replace(adapter, layers=layers)


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return {parameter: a parameter or buffer that shares its memory}, for parameters that share memory only."""
    spans = []
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        extent = sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size(), name))
    spans.sort()
    tied: dict[str, str] = {}
    widest: tuple[str, int, int, str] | None = None
    for span in spans:
        if widest is not None and span[0] == widest[0] and span[1] < widest[2]:
            tied.setdefault(widest[3], span[3])
            tied.setdefault(span[3], widest[3])
        if widest is None or span[0] != widest[0] or span[2] > widest[2]:
            widest = span
    return tied


Use = Literal["called", "read", "both"]

# attributes of a weight that are read without computing with it
_ABOUT = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "is_meta", "requires_grad", "numel", "element_size"})


def use_of(owner: nn.Module, attribute: str) -> Use:
    """Return how the owner's forward uses `self.<attribute>`: calls it, reads its weight to compute with it, or both.

    If it does neither, "called": another module may call the layer.
    """
    # mypy takes the hash of a class for that of its instances
    reads, others = _uses(type(owner))  # type: ignore[arg-type]
    if attribute not in reads:
        return "called"
    return "both" if attribute in others else "read"


@lru_cache(maxsize=256)
def _uses(owner: type[nn.Module]) -> tuple[set[str], set[str]]:
    """Return the attributes whose weights the forward computes with, and those that it uses in any other way."""
    reads: set[str] = set()
    others: set[str] = set()
    for code in _reachable(owner):
        for loaded, read in _loads(code):
            (reads if read else others).add(loaded)
    return reads, others


def _reachable(owner: type[nn.Module]) -> list[CodeType]:
    """Return the code of forward and of all methods that it uses, directly or through others."""
    names, codes = ["forward"], []
    # both lists grow during the loops: by functions within a function, and by methods that a function names
    for name in names:
        function = inspect.unwrap(getattr(owner, name, None))  # type: ignore[arg-type]
        within = [function.__code__] if hasattr(function, "__code__") else []
        for code in within:
            within += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            names += [method for method in code.co_names if method not in names and hasattr(owner, method)]
        codes += within
    return codes


def _loads(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Yield (attribute, True if its weight enters a computation) for the attributes that the code loads.

    Uses of a weight that only read a property, such as its dtype or class, are left out.
    """
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    for place, (operation, attribute) in enumerate(steps):
        if not operation.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            continue
        part, then = [steps[place + ahead] if place + ahead < len(steps) else ("", None) for ahead in (1, 2)]
        if not (part[0].startswith("LOAD_ATTR") and part[1] in ("weight", "bias")):
            yield str(attribute), False
            continue
        # in a call of isinstance, its name lies two steps before the attribute's
        is_question = then[1] in _ABOUT or any(argument == "isinstance" for _, argument in steps[max(0, place - 2) : place])
        if part[1] == "weight" and not is_question:
            yield str(attribute), True


# gradient at the output, input of the layer
Receiver = Callable[[Tensor, Tensor], None]


class GradientTap(torch.autograd.Function):
    """The identity on a layer's output, which hands the output's gradient and the layer's input to a receiver.

    `wanted` is any tensor that requires a gradient: an edge of the graph that makes the backward pass reach it, although
    neither the model's parameters nor its inputs need one.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, wanted: Tensor, x: Tensor, receiver: Receiver) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receiver = receiver
        # a copy: a view that a custom function returns may not be changed in place, as some models do next
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.receiver(gradients[0], x)
        return gradients[0], None, None, None
