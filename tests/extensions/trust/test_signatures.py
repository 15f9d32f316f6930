"""Signatures of adapters: what they cover, what they survive, and what is refused."""

import json

import pytest
import tiny_hubs

import loraweave as lw
from loraweave.errors import AdapterNotFound, HubError
from loraweave.extensions.trust import sign, signed_by
from loraweave.extensions.trust.signatures import MAX_KEY_BYTES, SIGNATURES, statement

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")

PLAIN = {"encoding": serialization.Encoding.PEM, "format": serialization.PrivateFormat.PKCS8}


def adapter(name, seed=0):
    card = {"description": f"does {name}", "examples": ["a", "b"], "license": "MIT"}
    return tiny_hubs.adapter(seed, name, base_model="tiny", card=card, files={"tokenizer.json": b"{}"})


def write_key(folder, number):
    """(private key's file, public key's file) of a key that is a function of the number."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))
    private, public = folder / f"{number}.pem", folder / f"{number}.pub.pem"
    private.write_bytes(key.private_bytes(**PLAIN, encryption_algorithm=serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(PLAIN["encoding"], serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def hub(tmp_path):
    with lw.Hub(tmp_path / "hub") as opened:
        opened.add(adapter("one", 1))
        opened.add(adapter("two", 2))
        yield opened


def test_a_signature_is_that_of_the_statement_written_out(hub, tmp_path):
    private, _ = write_key(tmp_path, 1)
    (record,) = sign(hub, private, ["one"])
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of b"{}"
    said = {
        "base_model": "tiny",
        "description": "does one",
        "examples": ["a", "b"],
        "files": {"tokenizer.json": digest},
        "hash": hub["one"].hash,
        "license": "MIT",
        "outputs": None,
        "statement": "loraweave adapter 1",
    }
    assert statement(record) == json.dumps(said).encode()
    ((digits, signature),) = record.card[SIGNATURES].items()
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(digits))
    key.verify(bytes.fromhex(signature), json.dumps(said).encode())
    assert record.version == 1


def test_adapters_that_no_given_key_signed_are_problems_by_name(hub, tmp_path):
    (first, public), (_, other) = write_key(tmp_path, 1), write_key(tmp_path, 2)
    sign(hub, first, ["one"])
    found = hub.verify(also=signed_by(public))
    assert not found.ok
    assert found.intact == ("one", "two")
    assert [problem.split(" by ")[0] for problem in found.problems] == ["adapter 'two' is not signed"]
    sign(hub, first)
    assert hub.verify(also=signed_by(public)).ok
    assert hub.verify(also=signed_by([other, public])).ok
    assert len(hub.verify(also=signed_by([other])).problems) == 2
    assert hub.verify().ok


def test_a_second_signature_stands_beside_the_first(hub, tmp_path):
    keys = [write_key(tmp_path, number) for number in (1, 2)]
    for private, _ in keys:
        sign(hub, private)
    assert all(hub.verify(also=signed_by(public)).ok for _, public in keys)


def test_a_signature_travels_with_the_folder_under_any_name(hub, tmp_path):
    private, public = write_key(tmp_path, 1)
    sign(hub, private)
    hub["one"].save_pretrained(tmp_path / "out")
    with lw.Hub(tmp_path / "other") as other:
        other.add(tmp_path / "out", name="renamed")
        digits = next(iter(other.record("renamed").card[SIGNATURES]))
        assert other.verify(also=signed_by(digits)).ok
        assert other.verify(also=signed_by(public)).ok


@pytest.mark.parametrize("change", ["weights", "description", "license", "examples", "signature"])
def test_what_was_changed_after_the_signature_is_a_problem(hub, tmp_path, change):
    private, public = write_key(tmp_path, 1)
    sign(hub, private, ["one"])
    signed = hub["one"]
    if change == "weights":
        hub.add(lw.Adapter("one", "tiny", adapter("one", 9).layers, card=signed.card, files=signed.files), replace=True)
    elif change == "signature":
        ((digits, signature),) = signed.card[SIGNATURES].items()
        card = {**signed.card, SIGNATURES: {digits: signature[::-1]}}
        hub.add(lw.Adapter("forged", "tiny", signed.layers, card=card, files=signed.files))
        hub.remove("one")
    else:
        hub.update("one", **{change: {"examples": ["c"], "license": "Apache-2.0"}.get(change, "does more")})
    hub.remove("two")
    (problem,) = hub.verify(also=signed_by(public)).problems
    assert "is not what" in problem
    assert "signed: its weights" in problem


def test_a_name_that_is_not_there_leaves_all_unsigned(hub, tmp_path):
    private, _ = write_key(tmp_path, 1)
    with pytest.raises(AdapterNotFound, match="three"):
        sign(hub, private, ["one", "three"])
    assert SIGNATURES not in hub.record("one").card


@pytest.mark.parametrize(
    ("content", "said"), [(b"hello", "openssl genpkey"), (b"\0" * 2 * MAX_KEY_BYTES, "openssl genpkey")]
)
def test_a_file_that_is_no_key_is_refused_with_the_command_that_makes_one(hub, tmp_path, content, said):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(HubError, match=said):
        sign(hub, tmp_path / "key")
    with pytest.raises(HubError, match="openssl pkey -pubout"):
        signed_by(tmp_path / "key")


def test_keys_of_another_kind_and_no_keys_are_refused(hub, tmp_path):
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519").X25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(x25519.private_bytes(**PLAIN, encryption_algorithm=serialization.NoEncryption()))
    with pytest.raises(HubError, match="X25519"):
        sign(hub, tmp_path / "key")
    with pytest.raises(HubError, match="no key"):
        signed_by([])
    with pytest.raises(HubError, match="cannot be read"):
        signed_by(tmp_path / "missing.pem")


def test_a_card_whose_signatures_are_something_else_is_unsigned(hub, tmp_path):
    _, public = write_key(tmp_path, 1)
    own = adapter("odd", 3)
    hub.add(lw.Adapter("odd", "tiny", own.layers, card={**own.card, SIGNATURES: ["x"]}))
    assert sum("is not signed by" in problem for problem in hub.verify(also=signed_by(public)).problems) == 3
