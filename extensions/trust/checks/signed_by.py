"""A check that each adapter of a hub, as it is now, was signed with one of the given keys."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike

from loraweave import HubError, Record
from loraweave.extend.formats import entry
from loraweave.extensions.trust.signatures import SIGNATURES, Key, hex_of, is_valid, read_public_key


def signed_by(keys: Key | Iterable[Key]) -> Callable[[Sequence[Record]], Iterator[str]]:
    """Return a check for `hub.verify(also=..)`: it yields a sentence for each adapter that none of these keys has signed.

    A signature made before the adapter was changed does not count. A key is a PEM file, or its 64 hexadecimal digits. Raises
    HubError without a key and for anything but an Ed25519 public key, PackageMissing without cryptography.
    """
    several = (keys,) if isinstance(keys, str | PathLike) else tuple(keys)
    if not several:
        raise HubError("signed_by() has no key; give at least one public key, or leave the check out")
    signers = {hex_of(key): key for key in map(read_public_key, several)}

    def problems(records: Sequence[Record]) -> Iterator[str]:
        for record in records:
            signatures = entry(record.card, SIGNATURES, dict) or {}
            by = [digits for digits in signers if digits in signatures]
            if not by:
                yield f"adapter {record.name!r} is not signed by {' or '.join(signers)}"
            elif not any(is_valid(signers[digits], signatures[digits], record) for digits in by):
                yield (
                    f"adapter {record.name!r} is not what {' or '.join(by)} signed: its weights, base model, license, "
                    "description, examples or files are others"
                )

    return problems
