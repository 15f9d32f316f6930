"""PrivateLoRA's split: exact against the same adapter in one process, counted to the byte, and peers that die or lie."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.errors import AdapterUnsupported, LayerMismatch, SourceUnavailable
from loraweave.extensions.federated.private import EMBEDDINGS, HEAD, HELLO, LAYER, PrivateDevice, serve_base, split_adapter
from loraweave.types import Factors

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [8, 8, 7, 8, 3]])
SERVE = """
import sys
import loraweave as lw
from loraweave.extensions.federated import serve_base
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
serve_base(model, lw.Adapter.from_pretrained(sys.argv[2]), ready=lambda host, port: print(port, flush=True))
"""


@pytest.fixture
def adapter(tiny_llama, make_adapter):
    return make_adapter(tiny_llama, "own", rank=3, targets=("q_proj", "v_proj", "down_proj"), seed=4)


@pytest.fixture
def parts(tiny_llama):
    """The embeddings and the head that the device has."""
    return tiny_llama.get_input_embeddings(), tiny_llama.get_output_embeddings()


@pytest.fixture
def serving(tiny_llama, adapter, request):
    """serving(devices): the port of a base in a thread, for so many devices; it is waited for at the end."""
    threads = []

    def start(devices=1):
        ports, known = [], threading.Event()

        def ready(host, port):
            ports.append(port)
            known.set()

        settings = {"ready": ready, "devices": devices, "timeout": 60.0}
        threads.append(
            threading.Thread(target=serve_base, args=(tiny_llama, split_adapter(adapter)[0]), kwargs=settings, daemon=True)
        )
        threads[-1].start()
        assert known.wait(60)
        return ports[0]

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def in_one_process(model, adapter):
    """Logits of all tokens, and what greedy decoding writes."""
    with torch.no_grad(), lw.Composer(model, {"own": adapter}).activate({"own": 1.0}):
        written = IDS_BT
        for _ in range(4):
            written = torch.cat([written, model(input_ids=written).logits[:, -1:].argmax(dim=-1)], dim=1)
        return model(input_ids=IDS_BT).logits, written


def test_the_parts_multiply_to_the_update_and_the_public_one_knows_its_subspaces_alone(adapter):
    public, cores = split_adapter(adapter)
    turned, draw = {}, torch.Generator().manual_seed(6)
    for layer, factors in adapter.layers.items():
        own = public.layers[layer]
        product_OI = own.b_OR.double() @ cores[layer].double() @ own.a_RI.double()
        assert torch.allclose(product_OI, factors.b_OR.double() @ factors.a_RI.double(), atol=1e-5)
        assert torch.allclose(own.a_RI @ own.a_RI.T, torch.eye(3), atol=1e-5)
        assert torch.allclose(own.b_OR.T @ own.b_OR, torch.eye(3), atol=1e-5)
        gauge_RR = 2 * torch.eye(3) + 0.3 * torch.randn(3, 3, generator=draw)
        turned[layer] = replace(factors, a_RI=gauge_RR @ factors.a_RI, b_OR=factors.b_OR @ gauge_RR.T)
    # another update of the same inputs and outputs has the same public part, but for a rotation
    other = split_adapter(replace(adapter, layers=turned))[0]
    for layer, own in public.layers.items():
        for side in ("a_RI", "b_OR"):
            first, second = (getattr(each, side) if side == "b_OR" else each.a_RI.T for each in (own, other.layers[layer]))
            assert torch.allclose(first @ first.T, second @ second.T, atol=1e-3)


@pytest.mark.own_models
def test_two_processes_give_the_logits_of_one_and_a_base_that_is_killed_is_named(tiny_llama, adapter, parts, tmp_path):
    public, cores = split_adapter(adapter)
    tiny_llama.save_pretrained(tmp_path / "base")
    public.save_pretrained(tmp_path / "public")
    base = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path / "base"), str(tmp_path / "public")], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(base.stdout.readline())
        expected, written = in_one_process(tiny_llama, adapter)
        with PrivateDevice(lw.Adapter.from_pretrained(tmp_path / "public"), cores, *parts, port=port) as device:
            assert torch.allclose(device.logits(IDS_BT), expected, atol=1e-4)
            assert torch.equal(device.generate(IDS_BT, max_new_tokens=4), written)
            ended = device.generate(IDS_BT, max_new_tokens=4, eos_token_id=int(written[0, 5]))
            assert bool((ended[0, 5:] == written[0, 5]).all())
            base.kill()
            base.wait(60)
            with pytest.raises(SourceUnavailable, match=f"the base at 127.0.0.1:{port}"):
                device.logits(IDS_BT)
        with pytest.raises(SourceUnavailable, match=r"does not answer .* start it with serve_base"):
            PrivateDevice(public, cores, *parts, port=port)
    finally:
        base.kill()
        base.wait(60)
        base.stdout.close()


def test_what_goes_over_is_counted_to_the_byte_beside_whole_activations(tiny_llama, adapter, parts, serving):
    public, cores = split_adapter(adapter)
    with PrivateDevice(public, cores, *parts, port=serving()) as device:
        greeted = device.traffic.sent + device.traffic.received
        device.logits(IDS_BT)
        device.generate(IDS_BT[:, :2], max_new_tokens=3)
        used = device.traffic
    # 10 tokens, then 4, 2 and 2; the states of all of the first 10 come back, then those of each row's last
    num_layers, size, calls = len(adapter.layers), 16, 4
    low_rank = 18 * 2 * 3 * num_layers * 4
    ends = (18 * size + (10 + 2 + 2 + 2) * size) * 4
    assert used.tokens == 18
    assert used.sent + used.received - greeted == low_rank + ends + HEAD.size * calls * (2 + 2 * num_layers)
    sides = sum(len(factors.b_OR) + factors.a_RI.shape[1] for factors in adapter.layers.values())
    spared = used.activation_bytes_per_token - used.bytes_per_token
    assert spared == pytest.approx(4 * (sides - 2 * 3 * num_layers))


@pytest.mark.parametrize("lie", ["dies", "shape", "kind", "greeting"])
def test_a_device_that_dies_or_lies_ends_its_own_connection_alone(lie, tiny_llama, adapter, parts, serving, caplog):
    public, cores = split_adapter(adapter)
    # before a base in this process has the model
    expected, _ = in_one_process(tiny_llama, adapter)
    port = serving(devices=2)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as bad:
        greeting = f'{{"adapter": "{public.hash}"}}'.encode()
        if lie == "greeting":
            bad.sendall(HEAD.pack(HELLO, 0, 0, 0, 2**40))
        else:
            bad.sendall(HEAD.pack(HELLO, 0, 0, 0, len(greeting)) + greeting)
            rows, size = (2**20, 2**60) if lie == "shape" else (1, 64)
            bad.sendall(HEAD.pack(LAYER if lie == "kind" else EMBEDDINGS, 0, rows, 1, size))
            if lie == "dies":
                bad.sendall(b"half of it")
        # a base that leaves something unread resets the connection
        with suppress(ConnectionError):
            bad.shutdown(socket.SHUT_WR)
            while bad.recv(4096):
                pass
    with PrivateDevice(public, cores, *parts, port=port) as device:
        assert torch.allclose(device.logits(IDS_BT), expected, atol=1e-4)
    said = {
        "dies": "ended the connection after 10 of 64 bytes",
        "shape": "asks for 1048576 rows of 1 tokens",
        "kind": "sent a frame of kind 2 where one of kind 1 was due",
        "greeting": "a greeting has at most",
    }
    assert said[lie] in caplog.text


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (b"", SourceUnavailable, "ended the connection after 0 of"),
        (HEAD.pack(LAYER, 0, 2, 5, 2**60), LayerMismatch, r"sent 1152921504606846976 bytes, and numbers of shape \(10, 3\)"),
        (HEAD.pack(LAYER, 999, 2, 5, 120), LayerMismatch, "asks for layer 999, and the adapter has 6"),
        (HEAD.pack(HELLO, 0, 0, 0, 0), LayerMismatch, "sent a frame of kind 0 where one of kind 3 was due"),
    ],
)
def test_a_base_that_dies_or_lies_is_named(frame, error, message, adapter, parts):
    public, cores = split_adapter(adapter)
    server = socket.create_server(("127.0.0.1", 0))

    def lie():
        connection, _ = server.accept()
        with connection:
            greeting = f'{{"adapter": "{public.hash}"}}'.encode()
            connection.sendall(HEAD.pack(HELLO, 0, 0, 0, len(greeting)) + greeting + frame)
            with suppress(ConnectionError):
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

    thread = threading.Thread(target=lie, daemon=True)
    thread.start()
    with server, PrivateDevice(public, cores, *parts, port=server.getsockname()[1], timeout=60.0) as device:
        with pytest.raises(error, match=message):
            device.logits(IDS_BT)
        device.close()
        thread.join(60)


def test_parts_that_do_not_belong_together_are_refused(tiny_llama, adapter, parts, serving, make_adapter):
    other, cores = split_adapter(make_adapter(tiny_llama, "other", rank=3, targets=("q_proj",), seed=5))
    with pytest.raises(LayerMismatch, match="give both the parts of one split"):
        PrivateDevice(other, cores, *parts, port=serving())
    head = make_adapter(tiny_llama, "head", targets=("lm_head",))
    with pytest.raises(LayerMismatch, match=r"'lm_head' of .* and the model's blocks have None of that name"):
        serve_base(tiny_llama, split_adapter(head)[0])
    layer, factors = next(iter(adapter.layers.items()))
    wide = Factors(torch.randn(2, 5), torch.randn(16, 2))
    with pytest.raises(LayerMismatch, match=r"of \(16, 5\)"):
        serve_base(tiny_llama, split_adapter(replace(adapter, layers={layer: wide}))[0])
    scaled = replace(factors, gain_O=torch.ones(len(factors.b_OR)))
    with pytest.raises(AdapterUnsupported, match="make it a plain LoRA first"):
        split_adapter(replace(adapter, layers={layer: scaled}))
