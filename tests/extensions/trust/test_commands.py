"""`loraweave hub sign`, and the option of `hub verify` that asks for signatures."""

from pathlib import Path

import pytest
from command_line import adapter, call

import loraweave as lw


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        opened.add(adapter("antonym", 0))
        opened.add(adapter("[bold] :smile: 😀", 1))
        yield opened


def test_sign_and_verify_name_what_is_unsigned(hub):
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    Path("key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    digits = key.public_key().public_bytes_raw().hex()
    assert "signed 1 adapters" in call("hub", "sign", "key.pem", "antonym").stderr
    done = call("hub", "verify", "--signed-by", digits)
    assert done.exit_code == 1
    assert "[bold]" in done.stdout
    assert "'antonym'" not in done.stdout
    call("hub", "sign", "key.pem")
    assert call("hub", "verify", "--signed-by", digits).exit_code == 0
