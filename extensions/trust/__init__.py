"""Who vouches for an adapter, and does it look like the others of its base? For hubs of what others have trained.

`hub.add` compares each adapter with the others of its base by the examiner `anomalies` (10 ms for rank 8 of 60 layers).
`sign` signs adapters of a hub (Ed25519), `signed_by` is the check of `Hub.verify` that names adapters without a valid
signature of their present content. Signatures need cryptography (`loraweave[sign]`) and read no weights.
"""

from loraweave.extend import face

_MODULES = {"checks.signed_by": "signed_by", "signatures": "sign"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
