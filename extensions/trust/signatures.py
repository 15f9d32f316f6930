"""Signatures of adapters: Ed25519 (RFC 8032) signatures of an adapter's content and of its description.

They sign a statement, JSON with sorted keys: the content hash (factors, heads, invocation tokens), the base model's id, the
license, the description, sample inputs and outputs, and the sha256 of the files beside the weights. The name is not part of
it, so a renamed adapter stays signed. Signatures are in the card, {public key: signature} in hexadecimal, saved with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loraweave import Hub, HubError, PackageMissing, Record
from loraweave.extend.formats import entry
from loraweave.extend.hubs import listed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURES = "signatures"
# the largest file of a key that is read; Ed25519 keys are much smaller
MAX_KEY_BYTES = 10_000

# the path of a PEM file, or for a public key its 64 hexadecimal digits
Key: TypeAlias = str | PathLike[str]


def statement(record: Record) -> bytes:
    """Return the statement about an adapter, as the bytes that are signed."""
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


def sign(hub: Hub, key: Key, names: Iterable[str] | None = None) -> list[Record]:
    """Sign adapters of a hub, all by default, with the Ed25519 private key in a PEM file, and return their new records.

    Raises HubError for a file without such a key, AdapterNotFound for an unknown name; then nothing is signed.
    """
    private = _read_private_key(key)
    digits = hex_of(private.public_key())

    def signatures(record: Record) -> dict[str, str]:
        return {**(entry(record.card, SIGNATURES, dict) or {}), digits: private.sign(statement(record)).hex()}

    return hub.annotate(SIGNATURES, signatures, names)


def _read_private_key(path: Key) -> Ed25519PrivateKey:
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


def is_valid(key: Ed25519PublicKey, signature: object, record: Record) -> bool:
    """Return True if a signature, in hexadecimal, was made by the key for the adapter as it is now."""
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
