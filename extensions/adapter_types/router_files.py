"""POLY folders that PEFT saved: `lw.router` opens them, and a hub stores a folder of several tasks as a router."""

from pathlib import Path
from typing import Any

from loraweave import Adapter, ExpertPool
from loraweave.extend.formats import config_fields
from loraweave.extend.routing import TokenRouter

FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_router(folder: Path) -> bool:
    """Return True if the folder is a POLY that PEFT saved; its state is not checked."""
    return config_fields(folder).get("peft_type") == "POLY"


def is_mixture(folder: Path) -> bool:
    """Return True if the folder is a POLY of several tasks, not of one, which is read as an adapter."""
    return is_router(folder) and config_fields(folder).get("n_tasks", 1) != 1


def read(folder: Path, pool: ExpertPool | None, model: Any) -> TokenRouter:
    """Return the router of a POLY folder, with a pool of its own, which reads the adapter of each task on first use.

    `pool` and `model` are not used.
    """
    from loraweave.extensions.adapter_types.formats.poly import Poly as Format
    from loraweave.extensions.adapter_types.routers.poly import Poly

    tasks = ExpertPool.on_demand(Format.part_names(folder), lambda name: Adapter.from_pretrained(folder / name))
    router = Poly(tasks)
    router.pool = tasks
    return router.eval()
