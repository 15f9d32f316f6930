"""A server on loopback over a hub of three adapters."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from server_clients import Client, Counted, answering

import loraweave as lw
from loraweave.serving import app
from loraweave.serving.limits import Limits

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ message.role[0] }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def serve(tmp_path, monkeypatch, make_model, make_adapters, tokenizer):
    """serve(limits..., api_key=..., key_file=...): the client of a server over a hub of the adapters a, b, c and @kept."""
    # an extension's count where it is installed
    monkeypatch.setattr(app, "Metrics", Counted)

    @contextmanager
    def run(template=TEMPLATE, api_key=None, key_file=None, **limits):
        model = make_model("llama", dtype=torch.float64)
        adapters = make_adapters(model, "llama")
        with lw.Hub(tmp_path / "hub") as hub:
            for adapter in adapters:
                hub.add(adapter)
            hub.save_composition("kept", lw.parse("0.5*a + 0.5*c"))
            tokenizer.chat_template = template
            try:
                keys = {"api_key": api_key, "key_file": key_file}
                limited = {"limits": Limits(**limits), "port": 0, "log_level": "critical"}
                server = app.make_server(hub, model, tokenizer, **limited, **keys)
                with answering(server) as port:
                    client = Client(port, hub, lw.Composer(model, adapters, tokenizer=tokenizer))
                    client.server, client.face = server, server.face
                    yield client
            finally:
                tokenizer.chat_template = None

    return run
