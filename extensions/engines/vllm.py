"""Formulas as LoRA names in vLLM: the resolver that an installed loraweave adds to its server, and a fix of its workers.

vLLM calls `register` in each of its processes (entry points of the group GROUP). In the server that adds a resolver of LoRA
names. vLLM asks it once for each name and keeps the answer in a table; so that a name never answers with an adapter's former
content, and no folder is deleted while a request may read it, the resolver puts a table of its own in its place (`_Names`).
Read with vLLM 0.32: entrypoints/openai/models/serving.py, v1/core/kv_cache_utils.py, lora/worker_manager.py.
"""

import asyncio
import itertools
import logging
import os
import sys
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)

GROUP = "vllm.general_plugins"
HUB, FOLDER = "LORAWEAVE_HUB", "LORAWEAVE_SERVED_FOLDER"
MAX_ERROR, MAX_BYTES = "LORAWEAVE_MAX_ERROR", "LORAWEAVE_SERVED_BYTES"
# vLLM counts the adapters that it names itself from 1, and some of its releases keep the numbers in 32 bits
FIRST_ID = 1 << 30


def register() -> None:
    """Add the resolver, and fix rows without an adapter on CPUs; do nothing unless $LORAWEAVE_HUB is set.

    Raises ValueError, which ends vLLM's start, for a hub that is missing and for limits that are not numbers.
    """
    if not os.environ.get(HUB):
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    _settings()
    mend_rows_without_adapter()
    if "loraweave" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("loraweave", Resolver())
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() not in ("1", "true"):
        logger.warning("%s is set, but vLLM resolves names only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", HUB)


class Resolver:
    """A resolver of LoRA names that are formulas, by vLLM's protocol `LoRAResolver`."""

    def __init__(self) -> None:
        self._folders: Any = None
        self._opening = asyncio.Lock()
        self._ids: dict[str, int] = {}
        self._numbers = itertools.count(FIRST_ID)
        # name of a folder: its request, while vLLM refers to it
        self._requests: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return the request that vLLM loads for a formula; None where another resolver may know the name.

        Raises vLLM's GracefulHTTPError with the status and text of the refusal.
        """
        server = _asking_server(sys._getframe(1))
        try:
            async with self._opening:
                if self._folders is None:
                    self._folders = await asyncio.to_thread(_folders, server, base_model_name)
            if not isinstance(server.lora_requests, _Names):
                server.lora_requests = _Names(server.lora_requests, self._folders)
            folder = await asyncio.to_thread(self._folders.hold, lora_name)
        except Exception as error:
            return _refused(error, others=len(server.lora_resolvers) > 1)
        request = self._request(folder)
        server.lora_requests.forget(self._folders.surplus())
        self._folders.trim()
        try:
            # vLLM would load it later, but without telling the client the reason of a failure
            await server.engine_client.add_lora(request)
        except Exception as error:
            if server.engine_client.errored:
                raise
            raise _error(400, f"vLLM cannot load {folder.canonical!r}: {error}") from error
        return request

    def _request(self, folder: Any) -> Any:
        """Return the request of a folder, one object for each name: two with different numbers would break vLLM's worker."""
        known = self._requests.get(folder.name)
        if known is not None:
            self._folders.release(folder.key)
            return known
        number = self._ids.get(folder.name) or self._ids.setdefault(folder.name, next(self._numbers))
        made = _request_type()(lora_name=folder.name, lora_int_id=number, lora_path=str(folder.path))
        self._requests[folder.name] = made
        # the request lives as long as vLLM has it in its table or in an unanswered HTTP request
        weakref.finalize(made, self._folders.release, folder.key)
        return made


_NOTHING: Mapping[str, Any] = MappingProxyType({})
_asked: ContextVar[Mapping[str, Any]] = ContextVar("_asked", default=_NOTHING)


class _Names(dict[str, Any]):
    """vLLM's table {requested name: LoRA request}, which contains a formula only while its content is unchanged.

    vLLM looks a name up several times for one HTTP request, in one task: the first result holds for all of them.
    """

    def __init__(self, known: Mapping[str, Any], folders: Any) -> None:
        super().__init__(known)
        self._folders = folders

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name in _asked.get():
            return True
        request = super().get(name)
        if request is None or not isinstance(request, _request_type()):
            return request is not None
        key = _key_of(request)
        try:
            current = self._folders.key(name)
        except Exception:
            # vLLM then asks the resolver, which raises the reason
            current = None
        if current != key:
            self.pop(name, None)
            return False
        self._folders.touch(key)
        _asked.set({**_asked.get(), name: request})
        return True

    def __getitem__(self, name: str) -> Any:
        requested = _asked.get()
        return requested[name] if name in requested else super().__getitem__(name)

    def values(self) -> Any:
        """Return each request once, under however many spellings it was asked for: vLLM lists these at /v1/models."""
        return list({id(request): request for request in super().values()}.values())

    def __setitem__(self, name: str, request: Any) -> None:
        super().__setitem__(name, request)
        if isinstance(request, _request_type()):
            _asked.set({**_asked.get(), name: request})

    def forget(self, keys: list[str]) -> None:
        """Remove the requests of these folders, so that new ones ask the resolver again; running ones keep their folders."""
        gone = set(keys)
        kind = _request_type()
        for name in [name for name, request in self.items() if isinstance(request, kind) and _key_of(request) in gone]:
            self.pop(name, None)


def mend_rows_without_adapter() -> None:
    """Make rows without an adapter get no update on CPUs, where vLLM (0.32) gives them the last slot's adapter.

    Their index is -1, with which its CPU operators choose the last slot (vLLM pull requests 48421 and 49656). While names
    come and go every slot is taken, so that the base would answer with some adapter. Other operators are unchanged.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name, places in (("bgmv_expand", ()), ("bgmv_expand_slice", (0, 1))):
        operator = getattr(lora_ops, name)
        y_BO = torch.zeros(1, 1)
        operator(torch.ones(1, 1), torch.ones(1, 1, 1, 1), y_BO, torch.tensor([-1]), *places, True)
        if y_BO.item() == 0.0:
            continue
        mended = _without_rows_of_none(operator)
        setattr(lora_ops, name, mended)
        setattr(punica_cpu, name, mended)
        logger.warning("vLLM's %s gives rows without an adapter that of the last slot; it is mended in this process", name)


def _without_rows_of_none(operator: Any) -> Any:
    def mended(x_BR: Any, b_SOR: Any, y_BO: Any, slots_B: Any, *rest: Any, **named: Any) -> None:
        operator(x_BR.masked_fill((slots_B < 0)[: x_BR.shape[0], None], 0.0), b_SOR, y_BO, slots_B, *rest, **named)

    return mended


def _asking_server(frame: Any) -> Any:
    """Return the calling OpenAIServingModels from its stack frame, since vLLM passes no server to a resolver."""
    server = frame.f_locals.get("self")
    if isinstance(getattr(server, "lora_requests", None), dict) and hasattr(server, "engine_client"):
        return server
    raise _error(
        500, "this release of vLLM keeps the names of its adapters elsewhere than loraweave looks: it could serve old ones"
    )


def _settings() -> tuple[str, dict[str, float]]:
    """Return the hub's place and the limits that are set. Raises ValueError for a missing hub or an invalid limit."""
    hub = os.environ[HUB]
    # opening a missing hub would create an empty one
    if "://" not in hub and not Path(hub).is_dir():
        raise ValueError(f"${HUB} is {hub!r}, and there is no hub: `loraweave hub add` makes one")
    limits = {}
    for name, option, kind in ((MAX_ERROR, "max_error", float), (MAX_BYTES, "max_bytes", int)):
        if said := os.environ.get(name):
            try:
                limits[option] = kind(said)
            except ValueError:
                raise ValueError(f"${name} is {said!r}, which is no {'whole ' * (kind is int)}number") from None
            if not limits[option] >= 0:
                raise ValueError(f"${name} is {said}; it is a number of 0 or more")
    return hub, limits


def _folders(server: Any, model: str) -> Any:
    from loraweave import Hub
    from loraweave.extend import cache_folder
    from loraweave.extensions.engines.folders import Folders, stored_base

    hub, limits = _settings()
    base, shapes = stored_base(model)
    return Folders(
        Hub(hub),
        Path(os.environ.get(FOLDER) or cache_folder() / "served"),
        max_rank=server.engine_client.vllm_config.lora_config.max_lora_rank,
        base=base,
        shapes=shapes,
        **limits,  # type: ignore[arg-type]
    )


def _refused(error: Exception, *, others: bool) -> None:
    """Raise the refusal as vLLM's error for the client; only log it if another resolver may know the name."""
    from loraweave.extend.serving import refusal_of

    refusal = refusal_of(error)
    if others and refusal.status == 404:
        logger.info("%s", refusal)
        return
    raise _error(refusal.status, str(refusal)) from error


def _error(status: int, text: str) -> Exception:
    import vllm.exceptions

    known = getattr(vllm.exceptions, "GracefulHTTPError", None)
    # earlier releases report a ValueError to the client with status 400
    return ValueError(text) if known is None else known(text, HTTPStatus(status))


def _key_of(request: Any) -> str:
    return Path(request.lora_path).name


@cache
def _request_type() -> type:
    """Return a subclass of vLLM's LoRARequest that allows weak references and keeps its number when vLLM renames it."""
    from vllm.lora.request import LoRARequest

    class FormulaRequest(LoRARequest, weakref=True):  # type: ignore[call-arg,misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name != "lora_int_id":
                super().__setattr__(name, value)

    return FormulaRequest
