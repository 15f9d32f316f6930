"""The model's `generate` while a router looks at whole inputs: what it is given are prompts, and what follows is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.mixing.standing_in import StandIn, give_back
from loraweave.routers.routing.prompts import prompted


class PromptedGenerate(StandIn):
    """Stands in for `generate`, which calls the model once a token, so that no call can tell a prompt from an answer.

    `begin` shows the router the prompts: an encoder runs before the model's own first call.
    """

    def __init__(self, model: nn.Module, begin: Callable[[dict[str, Any]], None]) -> None:
        self._model = model
        self._begin = begin
        self._own = vars(model).get("generate")
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        vars(model)["generate"] = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate."""
        ids_BT = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if not isinstance(ids_BT, Tensor) or ids_BT.ndim != 2 or ids_BT.is_floating_point():
            return self._generate(*args, **kwargs)
        mask_BT = kwargs.get("attention_mask")
        mask_BT = mask_BT if isinstance(mask_BT, Tensor) else self._inferred(ids_BT, kwargs)
        with prompted(ids_BT, mask_BT):
            if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
                self._begin({"input_ids": ids_BT, "attention_mask": mask_BT})
            return self._generate(*args, **kwargs)

    def _inferred(self, ids_BT: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The mask that generate makes where it is given none: padding is the padding token, unless that ends sequences."""
        given = kwargs.get("generation_config") or getattr(self._model, "generation_config", None)
        pad = kwargs.get("pad_token_id", getattr(given, "pad_token_id", None))
        end = kwargs.get("eos_token_id", getattr(given, "eos_token_id", None))
        if pad is None or pad in (end if isinstance(end, list | tuple) else [end]):
            return torch.ones_like(ids_BT)
        return ids_BT.ne(int(pad)).long()

    def own(self, name: str) -> Any:
        return self._own

    def remove(self) -> None:
        """Gives the model its own `generate` back."""
        give_back(self._model, "generate", self._own, self)
