"""Who vouches for an adapter, and does it look as if it had a backdoor? For hubs of what others have trained.

`hub.add` compares each adapter with the others of its base by the examiner `anomalies` (10 ms for rank 8 of 60 layers).
`sign` signs adapters of a hub (Ed25519), `signed_by` is the check of `Hub.verify` that names those that nobody has signed as
they are now. `BackdoorDetector` judges by spectra of weights, once it is fitted on adapters of your own. Signatures need
cryptography (`loraweave[sign]`) and read no weights; a detector takes the singular values of each layer.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.trust.backdoors import BackdoorDetector, signature, spectral_statistics
    from loraweave.extensions.trust.checks.signed_by import signed_by
    from loraweave.extensions.trust.signatures import sign
else:
    __getattr__ = lazy(
        __name__,
        {
            f"{__name__}.backdoors": "BackdoorDetector signature spectral_statistics",
            f"{__name__}.checks.signed_by": "signed_by",
            f"{__name__}.signatures": "sign",
        },
    )

__all__ = ["BackdoorDetector", "sign", "signature", "signed_by", "spectral_statistics"]
