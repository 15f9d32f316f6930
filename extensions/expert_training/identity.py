"""The identity of a training and of its loss function, by which a checkpoint recognises the training it belongs to."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from loraweave.extend import fingerprint, text_digest
from loraweave.extend.recipes import ExpertModel
from loraweave.extend.training import tensor_bytes

# values that are compared one by one; of a larger tensor, such as another model's, only the shape is
MAX_VALUES = 1_000_000


def loss_identity(function: Any) -> Any:
    """Return, for JSON, a loss function's name and code, and the numbers, texts, tensors and functions that it is bound to.

    These are its defaults, its closure's variables, a partial's arguments, and an object's attributes. Other values that it
    reads, such as globals and the content of lists, are ignored.
    """
    return _identity(function, {})


def _identity(value: Any, seen: dict[int, Any]) -> Any:
    match value:
        case None | int() | float() | str():
            return value
        case Tensor():
            return _tensor_digest(value)
    # a function may have itself in its scope
    if id(value) in seen:
        return "above"
    seen[id(value)] = value
    match value:
        case tuple():
            return [_identity(item, seen) for item in value]
        case partial():
            return ["partial", _identity(value.func, seen), _identity(value.args, seen), _named(value.keywords, seen)]
        case MethodType():
            return ["method", _identity(value.__func__, seen), _identity(value.__self__, seen)]
        case FunctionType():
            return [value.__qualname__, _code(value.__code__), _named(_bound(value), seen)]
        case type() | BuiltinFunctionType():
            return value.__qualname__
        case nn.Module():
            tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
            return _of_object(value, {**vars(value), **tensors}, type(value).forward, seen)
    callable_object = callable(value) and hasattr(value, "__dict__")
    return _of_object(value, vars(value) if callable_object else {}, type(value).__call__ if callable_object else None, seen)


def _of_object(value: Any, held: Mapping[str, Any], run: Any, seen: dict[int, Any]) -> Any:
    """Return an object's identity: its class, the code of `run`, which a call of it runs, and `held`, its attributes."""
    code = _code(run.__code__) if isinstance(run, FunctionType) else None
    attributes = {name: attribute for name, attribute in held.items() if not isinstance(attribute, dict)}
    return [type(value).__qualname__, code, _named(attributes, seen)]


def _bound(function: FunctionType) -> dict[str, Any]:
    """Return {name: value} of the variables in a function's closure and of its defaults."""
    scope = inspect.getclosurevars(function).nonlocals
    defaults = inspect.signature(function, follow_wrapped=False).parameters.values()
    return {**scope, **{option.name: option.default for option in defaults if option.default is not inspect.Parameter.empty}}


def _named(values: Mapping[str, Any], seen: dict[int, Any]) -> dict[str, Any]:
    return {name: _identity(value, seen) for name, value in values.items()}


def _tensor_digest(tensor: Tensor) -> Any:
    shape = list(tensor.shape)
    if tensor.numel() > MAX_VALUES:
        return shape
    return [shape, hashlib.sha256(tensor.detach().cpu().double().numpy().tobytes()).hexdigest()]


def _code(code: CodeType) -> str:
    """Return a digest of the code that does not depend on its file and line."""
    constants = list(map(_constant, code.co_consts))
    return text_digest(repr((code.co_code, code.co_names, constants)))


def _constant(value: Any) -> Any:
    match value:
        case CodeType():
            return _code(value)
        case frozenset():
            return sorted(map(repr, value))
    return repr(value)


def training_identity(model: ExpertModel, learning: list[str]) -> list[Any]:
    """Return [the recipe's options, {site: its experts' shape}, the names of parameters that learn], for JSON."""
    options = {name: repr(value) for name, value in model.recipe.options.items()}
    if model.recipe.revision > 1:
        options["revision"] = repr(model.recipe.revision)
    return [options, {name: repr(shape) for name, shape in model.shapes.items()}, learning]


def start_digest(model: ExpertModel) -> str:
    """Return the digest of the base and parameters that the training begins with, or began with if it was interrupted."""
    now = _digest(model)
    interrupted, began = model.interrupted
    return began if interrupted == now else now


@contextmanager
def remember_start(model: ExpertModel, began: str) -> Iterator[None]:
    """If an exception interrupts the block, note in the model the start's digest, `began`, for the call that resumes."""
    try:
        yield
    except BaseException:
        model.interrupted = (_digest(model), began)
        raise


def _digest(model: ExpertModel) -> str:
    base = json.dumps(fingerprint(model.base_model).to_json(), sort_keys=True)
    return hashlib.sha256(base.encode() + tensor_bytes(model.expert_state())).hexdigest()
