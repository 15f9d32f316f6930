"""SGLang's and LoRAX's calls as their documentation has them, answered by a stand-in: neither server runs here."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loraweave.errors import AdapterUnsupported, SourceUnavailable, UnknownName
from loraweave.serving.engines.folders import Folder, load, unload

FOLDER = Folder("0123456789abcdef" * 2, "0.5*a + 0.5*b", Path("/served/x"), 0.0)


class StandIn(BaseHTTPRequestHandler):
    """SGLang keeps the adapters that it is told to load; LoRAX opens what a request names."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.append((self.path, asked))
        status, answer = self.answer(asked)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, asked):
        known = self.server.known
        match self.path:
            case "/load_lora_adapter":
                if asked["lora_name"] in known:
                    return 400, {"success": False, "error_message": f"{asked['lora_name']} is loaded already"}
                known[asked["lora_name"]] = asked["lora_path"]
                return 200, {"success": True, "loaded_adapters": known}
            case "/unload_lora_adapter":
                known.pop(asked["lora_name"])
                return 200, {"success": True, "loaded_adapters": known}
            case "/generate":
                parameters = asked["parameters"]
                assert parameters["adapter_source"] == "local"
                return 200, {"generated_text": "b"}
        return 404, {}

    def log_message(self, *words):
        pass


@contextmanager
def standing_in():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.heard, server.known = [], {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_sglang_is_told_a_name_of_the_content_and_the_folder():
    with standing_in() as (server, url):
        assert load(FOLDER, url, engine="sglang") == {"lora_path": "0123456789abcdef"}
        assert server.known == {"0123456789abcdef": "/served/x"}
        with pytest.raises(AdapterUnsupported, match=r"refuses '0\.5\*a \+ 0\.5\*b': 400 .*loaded already"):
            load(FOLDER, url, engine="sglang")
        unload(FOLDER, url, engine="sglang")
        assert server.known == {}


def test_lorax_is_asked_for_one_token_by_the_local_folder():
    with standing_in() as (server, url):
        fields = load(FOLDER, url, engine="lorax")
        unload(FOLDER, url, engine="lorax")
    assert fields == {"parameters": {"adapter_id": "/served/x", "adapter_source": "local"}}
    asked = {"inputs": "a", "parameters": {"adapter_id": "/served/x", "adapter_source": "local", "max_new_tokens": 1}}
    assert server.heard == [("/generate", asked)]


def test_other_engines_and_addresses_are_refused():
    with pytest.raises(UnknownName, match=r"sglnag.*did you mean 'sglang'"):
        load(FOLDER, "http://127.0.0.1:1", engine="sglnag")
    with pytest.raises(SourceUnavailable, match="file:///etc"):
        load(FOLDER, "file:///etc", engine="lorax")
    with pytest.raises(SourceUnavailable, match=r"nothing answers at http://127\.0\.0\.1:1"):
        load(FOLDER, "http://127.0.0.1:1", engine="sglang")
