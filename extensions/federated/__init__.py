"""How do many owners train one adapter and keep their data to themselves? In rounds of clients, by strategies.

`federate` runs the rounds; `flexlora_clients` merges what clients have trained already.
`serve_base` and `PrivateDevice` answer with an adapter whose core and tokens stay on a device. It needs no other package,
except for differential privacy (opacus).
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.federated.federation import Federated, federate
    from loraweave.extensions.federated.methods.flexlora import flexlora_clients
    from loraweave.extensions.federated.private import PrivateDevice, Traffic, serve_base, split_adapter
else:
    _MODULES = {
        "methods.flexlora": "flexlora_clients",
        "federation": "Federated federate",
        "private": "PrivateDevice Traffic serve_base split_adapter",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = [
    "Federated",
    "PrivateDevice",
    "Traffic",
    "federate",
    "flexlora_clients",
    "serve_base",
    "split_adapter",
]
