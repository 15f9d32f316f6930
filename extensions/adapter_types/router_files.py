"""What PEFT saves of a POLY, which `lw.router` opens and, if it has several tasks, `Hub.add` keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraweave import Adapter, ExpertPool
from loraweave.extend import TokenRouter, config_fields

FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_router(folder: Path) -> bool:
    """Return whether PEFT saved a POLY there; says nothing about its state."""
    return config_fields(folder).get("peft_type") == "POLY"


def is_mixture(folder: Path) -> bool:
    """Return whether it has several tasks; a POLY of one is an adapter."""
    return is_router(folder) and config_fields(folder).get("n_tasks", 1) != 1


def read(folder: Path, pool: ExpertPool | None, model: Any) -> TokenRouter:
    """Return the router with a pool that makes the adapter of each task when it is used."""
    from loraweave.extensions.adapter_types.formats.poly import Poly as Format
    from loraweave.extensions.adapter_types.routers.poly import Poly

    tasks = ExpertPool.on_demand(Format.part_names(folder), lambda name: Adapter.from_pretrained(folder / name))
    router = Poly(tasks)
    router.pool = tasks
    return router.eval()
