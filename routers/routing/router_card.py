"""README.md of a router's repository: what the model hub lists it by, and how it is used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from loraweave.routers.routing.token_router import TokenRouter

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
