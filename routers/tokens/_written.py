"""A router saved as a folder: router.json with options and experts, router.safetensors with its tensors."""

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from safetensors.torch import save
from torch import Tensor

from loraweave.common.files import replacing
from loraweave.errors import WeightingError
from loraweave.hub.formats._card import front_matter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members, find_names

FORMAT = 1
FILE, TENSORS, ADAPTERS = "router.json", "router.safetensors", "adapters"
PACKAGES = ("loraweave", "torch", "transformers")


def write_router(
    folder: Path,
    pool: ExpertPool | None,
    *,
    name: str,
    options: Mapping[str, Any],
    members: Members,
    tensors: Mapping[str, Tensor],
    report: Mapping[str, Any] | None,
) -> Path:
    """Write the folder whole or not at all, with the adapters of the router's experts if a pool is given.

    Each adapter's folder has a number and not its name, which is free text. Raises WeightingError for a folder that holds
    something else, for options that JSON has no form for, and for a pool without some of the router's experts.
    """
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightingError(f"{folder} holds something that is not a router; name another folder")
    experts = [] if pool is None else [pool.adapters[expert] for expert in find_names(members, pool, name)]
    raw = save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
    recipe = {
        "format": FORMAT,
        "router": name,
        "options": {option: with_json_form(f"router {name!r}", option, value) for option, value in options.items()},
        "members": members.to_json(),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "adapters": len(experts),
        "report": finite(report),
        "versions": {package: version(package) for package in PACKAGES},
    }
    text = json.dumps(recipe, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(folder) as new:
        for number, adapter in enumerate(experts):
            adapter.save_pretrained(new / ADAPTERS / str(number))
        (new / TENSORS).write_bytes(raw)
        (new / FILE).write_text(text, encoding="utf-8")
    return folder


def finite(value: Any) -> Any:
    """Return the report with None for numbers that are not finite, since JSON cannot express them."""
    match value:
        case Mapping():
            return {name: finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def with_json_form(what: str, option: str, value: Any) -> Any:
    """Return the value, unchanged. Raises WeightingError if JSON cannot express it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WeightingError(
            f"{what} has {option}={value!r}, which JSON has no form for ({error}): make it with numbers, texts, lists or "
            "mappings of them"
        ) from error
    return value


NUM_SHOWN = 50
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


def router_card(name: str, members: Members, repository: str, *, with_pool: bool) -> str:
    """Return the README of a router: front matter for the model hub, a few lines of code, and the experts' names."""
    base, names = members.base_model, members.names
    matter = front_matter(base, "loraweave", ["lora", "loraweave", "router"], None)
    # names are free text; indented, on one line, they cannot act as markup
    shown = [" ".join(expert.split()) for expert in names[:NUM_SHOWN]]
    if len(names) > NUM_SHOWN:
        shown.append(f"... and {len(names) - NUM_SHOWN} more")
    return _TEXT.format(
        matter=yaml.safe_dump(matter, sort_keys=False),
        router=name,
        count=len(names),
        repository=repository,
        pool="router.pool" if with_pool else "pool",
        experts="\n".join(f"    {name}" for name in shown),
    )
