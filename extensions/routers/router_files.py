"""Folders of X-LoRA and `create_arrow_model` that PEFT saved: `lw.router` opens them, and `Hub.add` stores them."""

from pathlib import Path
from typing import Any

from loraweave import ExpertPool
from loraweave.extend.formats import config_fields
from loraweave.extend.routing import TokenRouter
from loraweave.extensions.routers.to_peft import ARROW, CONFIG, WEIGHTS

FILES = tuple(f"{place}{name}" for place in ("", "*/") for name in (CONFIG, WEIGHTS))


def is_router(folder: Path) -> bool:
    """Return True if PEFT saved a router in the folder; its files are not checked."""
    return config_fields(folder).get("peft_type") == "XLORA" or _is_arrow(folder)


is_mixture = is_router


def _is_arrow(folder: Path) -> bool:
    return (folder / ARROW / CONFIG).is_file()


def read(folder: Path, pool: ExpertPool | None, model: Any) -> TokenRouter:
    """Return the router, with its adapters as `pool`. `model`, the base, is needed for an X-LoRA with weights by layer."""
    from loraweave.extensions.routers.from_peft import read_arrow, read_xlora

    return read_arrow(folder) if _is_arrow(folder) else read_xlora(folder, pool, model)
