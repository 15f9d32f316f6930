"""Signatures of adapters: Ed25519 (RFC 8032) signatures of an adapter's content and of its description.

They sign a statement, JSON with sorted keys: the content hash (factors, heads, invocation tokens), the base model's id, the
license, the description, sample inputs and outputs, and the sha256 of the files beside the weights. The name is not part of
it, so a renamed adapter stays signed. Signatures are in the card, {public key: signature} in hexadecimal, saved with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loraweave.errors import HubError, PackageMissing
from loraweave.hub.formats._files import entry
from loraweave.hub.stores.kept_files import listed
from loraweave.types import Record

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURES = "signatures"
# the largest file of a key that is read; Ed25519 keys are much smaller
MAX_KEY_BYTES = 10_000

# the path of a PEM file, or for a public key its 64 hexadecimal digits
Key: TypeAlias = str | PathLike[str]


def statement(record: Record) -> bytes:
    """Return the bytes of an adapter that are signed."""
    said = {
        "statement": "loraweave adapter 1",
        "hash": record.hash,
        "base_model": record.base_model,
        "license": record.license,
        "description": record.description,
        "examples": list(record.examples),
        "outputs": record.card.get("outputs"),
        "files": {name: digest for name, (digest, _) in listed(record).items()},
    }
    return json.dumps(said, sort_keys=True).encode()


def signed(record: Record, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the record's card with a signature by this key, beside those of other keys."""
    others = entry(record.card, SIGNATURES, dict) or {}
    return {**record.card, SIGNATURES: {**others, hex_of(key.public_key()): key.sign(statement(record)).hex()}}


def signature_problems(records: Iterable[Record], signers: Mapping[str, Ed25519PublicKey]) -> Iterator[str]:
    """Yield a sentence for each adapter that none of these keys has signed as it is now."""
    for record in records:
        card_signatures = entry(record.card, SIGNATURES, dict) or {}
        by = {digits: card_signatures[digits] for digits in signers if digits in card_signatures}
        if not by:
            yield f"adapter {record.name!r} is not signed by {' or '.join(signers)}"
        elif not any(_is_valid(signers[digits], signature, record) for digits, signature in by.items()):
            yield (
                f"adapter {record.name!r} is not what {' or '.join(by)} signed: its weights, base model, license, "
                "description, examples or files are others"
            )


def public_keys(given: Key | Iterable[Key]) -> dict[str, Ed25519PublicKey]:
    """Return {hexadecimal digits: key}. Raises HubError for no key at all, and the errors of `read_public_key`."""
    several = (given,) if isinstance(given, str | PathLike) else tuple(given)
    if not several:
        raise HubError("signed_by has no key; give at least one public key, or leave it out")
    return {hex_of(key): key for key in map(read_public_key, several)}


def read_private_key(path: Key) -> Ed25519PrivateKey:
    """Return the key in a PEM file without a password. Raises HubError otherwise, PackageMissing without cryptography."""
    from_pem, private, _ = _cryptography()
    try:
        key = from_pem.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise HubError(
            f"{path} has no Ed25519 private key without a password ({error}); `openssl genpkey -algorithm ed25519` makes one"
        ) from error
    if not isinstance(key, private):
        raise HubError(f"{path} has a key of another kind ({type(key).__name__}); `openssl genpkey -algorithm ed25519`")
    return key


def read_public_key(given: Key) -> Ed25519PublicKey:
    """Return the key in a PEM file, or of 64 hexadecimal digits. Raises HubError for anything else."""
    from_pem, _, public = _cryptography()
    try:
        if isinstance(given, str) and len(given) == 64 and not Path(given).exists():
            return public.from_public_bytes(bytes.fromhex(given))
        key = from_pem.load_pem_public_key(_read(given))
    except (ValueError, TypeError) as error:
        raise HubError(
            f"{given!s:.80} is no Ed25519 public key ({error}); give 64 hexadecimal digits, or the file that "
            "`openssl pkey -pubout` writes"
        ) from error
    if not isinstance(key, public):
        raise HubError(f"{given!s:.80} has a key of another kind ({type(key).__name__}); Ed25519 is wanted")
    return key


def hex_of(key: Ed25519PublicKey) -> str:
    """Return the 32 bytes of a public key in hexadecimal."""
    return key.public_bytes_raw().hex()


def _is_valid(key: Ed25519PublicKey, signature: object, record: Record) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(str(signature)), statement(record))
    except (InvalidSignature, ValueError):
        return False
    return True


def _read(path: Key) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise HubError(f"{path!s:.80}: the key cannot be read ({error.strerror})") from error


def _cryptography() -> tuple[Any, type[Ed25519PrivateKey], type[Ed25519PublicKey]]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError as error:
        raise PackageMissing("signatures need the package cryptography: pip install 'loraweave[sign]'") from error
    return serialization, Ed25519PrivateKey, Ed25519PublicKey
