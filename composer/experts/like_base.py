"""The class of an expert model on a base: whoever asks for a class, a signature or an attribute gets the base's.

transformers asks before it works with a model: a pipeline for the name of its class, a Trainer whether it is a
PreTrainedModel, and by the arguments of `forward` which columns of a data set it takes.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn


class LikeBase(nn.Module):
    """A module around `base_model` that is an instance of its class too, takes its arguments, and has its attributes."""

    base_model: nn.Module
    # what a Trainer asks for of a quantised base: something on top of it that learns
    _hf_peft_config_loaded = True

    def __new__(cls, base_model: nn.Module, *_: Any, **__: Any) -> Any:
        original: Any = cls
        return _make(original, type(base_model))

    def __reduce__(self) -> tuple[Any, ...]:
        # a class made here has no name that a pickle could find it by
        original, *_ = (ancestor for ancestor in type(self).__mro__ if "_on" not in vars(ancestor))
        return _make, (original, type(self.base_model)), object.__getstate__(self)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.base_model, name)

    @property
    def generation_config(self) -> Any:
        """The generation config of the base, which `generate` follows."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base_model.generation_config = value

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """The names that a checkpoint of a Trainer leaves out: the base's."""
        return [name for name in self.state_dict() if name.startswith("base_model.")]


def _make(own: Any, base: Any) -> Any:
    return nn.Module.__new__(_class_on(own, base))


@cache
def _class_on(own: Any, base: Any) -> Any:
    """Return a class like `own` for models of class `base`; `own` itself if it is one already."""
    if hasattr(own, "_on"):
        return own
    signature = inspect.signature(base.forward)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [parameter for parameter in signature.parameters.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    task = inspect.Parameter("task", inspect.Parameter.KEYWORD_ONLY, default=None)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*named, task, *rest])  # type: ignore[attr-defined]
    forward.__doc__ = own.forward.__doc__
    made = {"forward": forward, "__class__": property(lambda _: base), "__module__": own.__module__, "_on": base}
    return type(own.__name__, (own,), made)
