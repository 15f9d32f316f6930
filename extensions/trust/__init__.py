"""Who vouches for an adapter, and does it look like the others of its base? For hubs of what others have trained.

`hub.add` compares each adapter with the others of its base by the examiner `anomalies` (10 ms for rank 8 of 60 layers).
`sign` signs adapters of a hub (Ed25519), `signed_by` is the check of `Hub.verify` that names adapters without a valid
signature of their present content. Signatures need cryptography (`loraweave[sign]`) and read no weights.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.trust.checks.signed_by import signed_by
    from loraweave.extensions.trust.signatures import sign
else:
    __getattr__ = lazy(__name__, {f"{__name__}.checks.signed_by": "signed_by", f"{__name__}.signatures": "sign"})

__all__ = ["sign", "signed_by"]
