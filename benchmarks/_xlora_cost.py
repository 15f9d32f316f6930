"""X-LoRA beside peft's, with one network: its passes, generation with the cache that peft's has not, and a training step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from _adapters import difference
from _ratios import Gate, Way
from torch import Tensor
from torch.nn.functional import cross_entropy

import loraweave as lw
from loraweave.routers.routing.learned_router import Step

LIMIT = 1e-4


class Xlora:
    """Our router in an engine, and a copy of its model in peft with the same experts and the same network."""

    def __init__(self, engine: lw.Composer, *, peers: bool, seed: int) -> None:
        self.engine, self.model = engine, engine.model
        torch.manual_seed(seed)
        self.router: Any = lw.router("xlora", engine.pool, hidden_size=self.model.config.hidden_size)
        self.peft = self._in_peft() if peers else None

    def active(self) -> AbstractContextManager[Any]:
        return self.engine.activate(self.router)

    def _in_peft(self) -> Any:
        model = copy.deepcopy(self.model)
        model.config.use_cache = False
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapters = self.engine.pool.adapters.values()
            # theirs have to be named by their places
            paths = {str(n): str(each.save_pretrained(Path(folder) / str(n))) for n, each in enumerate(adapters)}
            size = self.model.config.hidden_size
            made = peft.get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=size, adapters=paths))
        state = {name.replace("head.", "layers."): value for name, value in self.router.state_dict().items()}
        made.base_model.internal_xlora_classifier.load_state_dict(state)
        return made.eval()

    def gates(self, ids_BT: Tensor) -> list[Gate]:
        """Logits and gradients against peft's, and those of a call under the caches against those of all tokens at once."""
        middle = ids_BT.shape[1] // 2
        with torch.no_grad():
            base = self.model(ids_BT).logits
            with self.active():
                whole = self.model(ids_BT).logits
                cache = self.model(ids_BT[:, :middle], use_cache=True).past_key_values
                rest = self.model(ids_BT[:, middle:], past_key_values=cache, use_cache=True).logits
        checks = [Gate("xlora is the same under caches", difference(rest, whole[:, middle:]), LIMIT)]
        first, kept = self._gradient(ids_BT, {}), self._gradient(ids_BT, self._kept(ids_BT))
        checks.append(Gate("gradient with kept states equals that without", difference(kept, first), LIMIT))
        if self.peft is not None:
            with torch.no_grad():
                checks.append(Gate("xlora equals peft's", difference(whole, self.peft(input_ids=ids_BT).logits), LIMIT))
            loss(self.peft, input_ids=ids_BT).backward()
            weight = self.peft.base_model.internal_xlora_classifier.layers[0].weight
            checks.append(Gate("gradient equals peft's", difference(first, weight.grad), LIMIT))
        return [*checks, Gate("limit over the change that the adapters make", LIMIT / difference(whole, base), 0.1)]

    def training_ways(self, ids_BT: Tensor) -> Mapping[str, Way]:
        """A step's forward and backward; of the frozen base through its activations, with nothing to learn."""
        embedded = self.model.get_input_embeddings()(ids_BT)

        def base() -> None:
            loss(self.model, inputs_embeds=embedded.detach().requires_grad_()).backward()

        kept = self._kept(ids_BT)
        found = {
            "base alone": Way(base),
            "loraweave, xlora": Way(lambda: self._gradient(ids_BT, {})),
            "loraweave, xlora, states kept": Way(lambda: self._gradient(ids_BT, kept)),
        }
        if self.peft is not None:
            theirs = self.peft
            found["peft, xlora"] = Way(lambda: loss(theirs, input_ids=ids_BT).backward())
        return found

    def _kept(self, ids_BT: Tensor) -> dict[Any, Any]:
        """What the training keeps of these rows after their first step."""
        kept: dict[Any, Any] = {}
        self._gradient(ids_BT, kept)
        return kept

    def _gradient(self, ids_BT: Tensor, kept: dict[Any, Any]) -> Tensor:
        rows_B = torch.arange(ids_BT.shape[0])
        self.router.zero_grad()
        self.router.step = Step(torch.ones_like(ids_BT), torch.full_like(rows_B, -1), rows_B, kept)
        try:
            with self.active():
                loss(self.model, input_ids=ids_BT).backward()
        finally:
            self.router.step = None
        gradient: Tensor = self.router.head[0].weight.grad
        return gradient


def loss(forward: Callable[..., Any], **inputs: Tensor) -> Tensor:
    """Of ever the same made-up targets, all tokens counting."""
    logits_NV = forward(**inputs, use_cache=False).logits.flatten(0, 1)
    return cross_entropy(logits_NV, torch.arange(logits_NV.shape[0]) % logits_NV.shape[1])


def passes(setting: Xlora, make: Callable[..., Way], **more: Any) -> dict[str, Way]:
    """Ways of one kind of pass by their labels; `more` is for peft's, which keeps no cache."""
    found = {"loraweave, xlora": make(setting.model, setting.active)}
    if setting.peft is not None:
        found["peft, xlora"] = make(setting.peft, nullcontext, **more)
    return found
