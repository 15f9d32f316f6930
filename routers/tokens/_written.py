"""A router as a folder: router.json says what it is and for whom, router.safetensors has its tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from safetensors.torch import save

from loraweave import registry
from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.formats._replacing import replacing
from loraweave.hub.pool import ExpertPool
from loraweave.routers.combined import places_in

if TYPE_CHECKING:
    from loraweave.routers.tokens._router import TokenRouter


FORMAT = 1
FILE, TENSORS, ADAPTERS = "router.json", "router.safetensors", "adapters"
PACKAGES = ("loraweave", "torch", "transformers")


def write_router(router: TokenRouter, folder: Path, pool: ExpertPool | None) -> Path:
    """Writes the folder whole or not at all, with the adapters of the router's experts where a pool is given.

    Each adapter's folder has a number and not its name, which is free text. Raises WeightingError for a folder that holds
    something else, for options that JSON has no form for, and for a pool without some of the router's experts; ScopeError
    for a class that is in no file of routers/, and would not be found when it is read.
    """
    _require_readable(router)
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightingError(f"{folder} holds something that is no router; name another folder")
    adapters = [] if pool is None else [pool.adapters[name] for name in places_in(router, pool)]
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in router.state_dict().items()}
    raw = save(tensors)
    text = _recipe(router, hashlib.sha256(raw).hexdigest(), len(adapters))
    with replacing(folder) as new:
        for number, adapter in enumerate(adapters):
            adapter.save_pretrained(new / ADAPTERS / str(number))
        (new / TENSORS).write_bytes(raw)
        (new / FILE).write_text(text, encoding="utf-8")
    return folder


def _require_readable(router: TokenRouter) -> None:
    found = registry.get("routers", router.name) if router.name in registry.names("routers") else None
    if type(router) not in (found, getattr(found, "token_router", None)):
        raise ScopeError(
            f"router {type(router).__name__} is in no file of routers/, so lw.router() could not read it again: keep its "
            "state_dict() with safetensors, and make it anew"
        )


def _recipe(router: TokenRouter, digest: str, num_adapters: int) -> str:
    found = {
        "format": FORMAT,
        "router": router.name,
        "options": {name: with_json_form(f"router {router.name!r}", name, value) for name, value in router.options.items()},
        "members": router.members.to_json(),
        "sha256": digest,
        "adapters": num_adapters,
        "report": finite(router.report),
        "versions": {package: version(package) for package in PACKAGES},
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """A report with None where a number is not finite, which JSON has no form for."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_json_form(what: str, option: str, value: Any) -> Any:
    """The value as it is. Raises WeightingError where JSON has no form for it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WeightingError(
            f"{what} has {option}={value!r}, which JSON has no form for ({error}): make it with numbers, texts, lists or "
            "mappings of them"
        ) from error
    return value


NUM_SHOWN = 50
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_TEXT = """---
{matter}---
# Router {router} for {count} LoRA adapters

```python
import loraweave as lw

router = lw.router({repository!r})
engine = lw.Composer(model, {pool}, tokenizer=tokenizer)
engine.generate(["..."], mixture=router)
```

Its experts, in this order:

{experts}
"""


def router_card(router: TokenRouter, repository: str, *, with_pool: bool) -> str:
    """Front matter as the model hub reads it, a few lines of code, and the experts' names."""
    base, names = router.members.base_model, router.members.names
    matter: dict[str, Any] = {"library_name": "loraweave", "tags": ["lora", "loraweave", "router"]}
    # the model hub refuses what is no id, such as a folder
    if _ID.fullmatch(base):
        matter |= {"base_model": base, "base_model_relation": "adapter"}
    # names are free text: indented on one line they are no markup
    shown = [" ".join(name.split()) for name in names[:NUM_SHOWN]]
    if len(names) > NUM_SHOWN:
        shown.append(f"... and {len(names) - NUM_SHOWN} more")
    return _TEXT.format(
        matter=yaml.safe_dump(matter, sort_keys=False),
        router=router.name,
        count=len(names),
        repository=repository,
        pool="router.pool" if with_pool else "pool",
        experts="\n".join(f"    {name}" for name in shown),
    )
