"""How do many owners train one adapter and keep their data to themselves? In rounds of clients, by strategies.

`federate` runs the rounds; `flexlora_clients` merges what clients have trained already.
`serve_base` and `PrivateDevice` answer with an adapter whose core and tokens stay on a device. It needs no other package,
except for differential privacy (opacus).
"""

from loraweave.extend import face

_MODULES = {
    "federation": "Federated federate",
    "methods.flexlora": "flexlora_clients",
    "private": "PrivateDevice Traffic serve_base split_adapter",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
