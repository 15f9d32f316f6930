"""Formulas on disk: named by content, exact or within the limit of the error, whole, and kept while they are in use."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_hubs
import torch

import loraweave as lw
from loraweave.errors import (
    AdapterNotFound,
    AdapterUnsupported,
    BaseModelMismatch,
    BudgetExceeded,
    CompositionError,
    FormulaError,
    HubLocked,
    LayerMismatch,
    ScopeError,
    SourceUnavailable,
    UnknownName,
)
from loraweave.extensions.engines import folders as served
from loraweave.extensions.engines.folders import SETTLED, Folder, Folders
from loraweave.extensions.engines.loading import load, unload
from loraweave.types import BaseKey, Fingerprint


@pytest.fixture
def hub(tmp_path):
    """a, b, c and d: updates of rank 2 from 5 inputs to 3 outputs; any two of them together have rank 3."""
    hub = lw.Hub(tmp_path / "hub")
    for seed, name in enumerate("abcd"):
        hub.add(tiny_hubs.adapter(seed, name))
    return hub


@pytest.fixture
def opened(tmp_path, hub):
    @contextmanager
    def opened(**options):
        folders = Folders(hub, tmp_path / "served", **{"max_rank": 8, **options})
        try:
            yield folders
        finally:
            folders.close()

    return opened


def delta(adapter):
    """The update B A of the one layer."""
    factors = adapter.layers["layer"]
    return factors.b_OR.double() @ factors.a_RI.double()


def written(folder):
    return delta(lw.Adapter.from_pretrained(folder.path))


def on_disk(tmp_path):
    return {path.name for path in (tmp_path / "served").iterdir() if not path.name.startswith(".lock")}


def test_a_folder_holds_what_the_formula_says(hub, opened):
    with opened() as folders:
        folder = folders.hold("0.7*a - 0.4*b")
    torch.testing.assert_close(written(folder), 0.7 * delta(hub["a"]) - 0.4 * delta(hub["b"]), rtol=0, atol=1e-6)
    assert folder.relative_error == 0.0


def test_equal_formulas_are_one_folder_and_a_changed_adapter_is_another(hub, opened, tmp_path):
    with opened() as folders:
        first, again = folders.hold("0.5*a + 0.5*b"), folders.hold(".5*(b + a)")
        hub.add(tiny_hubs.adapter(9), name="a", replace=True)
        changed = folders.hold("0.5*a + 0.5*b")
        assert first == again
        assert {first.key, changed.key} == on_disk(tmp_path)
        assert len({first.name, changed.name}) == 2
        assert first.name.startswith("0.5*a + 0.5*b#")
        torch.testing.assert_close(written(changed), 0.5 * delta(hub["a"]) + 0.5 * delta(hub["b"]), rtol=0, atol=1e-6)


def test_the_name_of_a_folder_is_a_formula_until_its_adapters_change(hub, opened):
    with opened() as folders:
        folder = folders.hold("a + b")
        assert folders.hold(folder.name) == folder
        hub.add(tiny_hubs.adapter(9), name="a", replace=True)
        with pytest.raises(AdapterNotFound, match=r"no longer there.*changed.*is now #[0-9a-f]{16}"):
            folders.hold(folder.name)


def test_a_cut_within_the_limit_is_the_best_one_and_above_it_is_refused(hub, opened, tmp_path):
    total = delta(hub["a"]) + delta(hub["b"])
    singular = torch.linalg.svdvals(total)
    error = (singular[2] / singular.norm()).item()
    with opened(max_rank=2, max_error=1.0) as folders:
        folder = folders.hold("a + b")
        assert folder.relative_error == pytest.approx(error, rel=1e-4)
        assert (torch.linalg.norm(written(folder) - total) / singular.norm()).item() == pytest.approx(error, rel=1e-4)
    # also what an earlier process wrote under a higher limit
    with opened(max_rank=2, max_error=error / 2) as folders, pytest.raises(AdapterUnsupported) as refused:
        folders.hold("b + a")
    assert f"{error:.3g}" in str(refused.value)
    with opened(max_rank=2, max_error=error / 2) as folders, pytest.raises(AdapterUnsupported) as refused:
        folders.hold("a - b")
    assert "rank 4 above the server's 2" in str(refused.value)
    assert len(on_disk(tmp_path)) == 1


def test_servers_of_other_ranks_do_not_share_a_folder(opened):
    with opened(max_rank=8) as folders:
        first = folders.hold("a + b").key
    with opened(max_rank=4) as folders:
        assert folders.hold("a + b").key != first


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("a +", FormulaError, r"a \+\n"),
        ("a + nobody", FormulaError, "nobody"),
        ("@nobody", FormulaError, "nobody"),
        ("base", ScopeError, "base model.*server's name"),
        ("a - a", ScopeError, "base model"),
        ("auto", ScopeError, "retrieval"),
        ("arrow(a, b)", ScopeError, "router 'arrow'"),
        ("'my dora'", AdapterUnsupported, r"is DoRA.*to_lora"),
        ("'my head'", AdapterUnsupported, "trained heads"),
        ("'my head' + a", CompositionError, "trained heads"),
    ],
)
def test_what_no_folder_can_say_is_refused_by_name(hub, opened, tmp_path, name, error, said):
    dora = hub["a"].layers["layer"]
    hub.add(replace(hub["a"], name="my dora", layers={"layer": replace(dora, magnitude_O=torch.ones(3))}))
    hub.add(replace(hub["a"], name="my head", heads={"lm_head.weight": torch.ones(2, 2)}))
    with opened() as folders, pytest.raises(error, match=said):
        folders.hold(name)
    assert on_disk(tmp_path) == set()


@pytest.mark.parametrize("of_compose", [False, True])
def test_a_stored_router_is_refused_as_a_router(hub, opened, tiny_llama, tokenizer, make_adapters, of_compose):
    routed = lw.parse("arrow(a, b)")
    if of_compose:
        pool, task = (
            lw.ExpertPool(make_adapters(tiny_llama, "llama")),
            lw.Task([("a", "ab"), ("b", "ba")], instruction="swap"),
        )
        routed = lw.compose(tiny_llama, tokenizer, pool, task, method="arrow", top_k=1, progress=False)
    hub.save_composition("routed", routed)
    with opened() as folders, pytest.raises(ScopeError, match="router"):
        folders.hold("@routed")


def test_an_adapter_of_another_base_model_is_refused(hub, opened):
    its, own = Fingerprint("1" * 32, (1.0, 2.0)), Fingerprint("1" * 32, (1.0, 3.0))
    hub.add(replace(hub["a"], name="foreign", fingerprint=its))
    with opened(base=BaseKey("org/base", None, own)) as folders:
        folders.hold("a")
        with pytest.raises(BaseModelMismatch, match=r"'foreign'.*1 of 2 sampled weights differ"):
            folders.hold("a + foreign")


def test_an_update_of_a_layer_that_the_model_does_not_have_is_refused(hub, opened):
    with opened(shapes={"layer.weight": (3, 5)}) as folders:
        folders.hold("a")
    with opened(shapes={"layer.weight": (3, 4)}) as folders, pytest.raises(LayerMismatch, match=r"\(3, 5\).*\(3, 4\)"):
        folders.hold("b")
    with opened(shapes={"other.weight": (3, 5)}) as folders, pytest.raises(LayerMismatch, match="no such layer"):
        folders.hold("c")


@pytest.fixture
def no_grace(monkeypatch):
    monkeypatch.setattr(served, "GRACE_S", 0.0)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.path.iterdir())


def test_least_recently_used_folders_go_first(opened, tmp_path, no_grace):
    with opened() as folders:
        size = size_of(folders.hold("a"))
    with opened(max_bytes=int(3.5 * size)) as folders:
        keys = {name: folders.hold(name).key for name in "abc"}
        for key in keys.values():
            folders.release(key)
        folders.touch(keys["a"])
        newest = folders.hold("d").key
        assert folders.surplus() == [keys["b"]]
        folders.trim()
        assert on_disk(tmp_path) == {keys["a"], keys["c"], newest}
        # and it is made anew
        assert folders.hold("b").path.is_dir()


def test_a_folder_in_use_stays_above_the_limit_until_nobody_has_it(opened, tmp_path, no_grace):
    with opened() as folders:
        size = size_of(folders.hold("a"))
    with opened(max_bytes=int(1.5 * size)) as folders:
        twice = folders.hold("a").key
        folders.hold("a")
        other = folders.hold("b").key
        folders.release(twice)
        folders.trim()
        assert on_disk(tmp_path) == {twice, other}
        folders.release(twice)
        folders.trim()
        assert on_disk(tmp_path) == {other}


def test_a_folder_stays_for_a_while_after_its_last_use(opened, tmp_path):
    with opened() as folders:
        size = size_of(folders.hold("a"))
    with opened(max_bytes=int(1.5 * size)) as folders:
        first, second = folders.hold("a").key, folders.hold("b").key
        folders.release(first)
        folders.trim()
        assert on_disk(tmp_path) == {first, second}


def test_a_folder_above_the_limit_is_refused(opened, tmp_path):
    with opened(max_bytes=100) as folders, pytest.raises(BudgetExceeded, match=r"bytes, above the limit of 100"):
        folders.hold("a")
    assert on_disk(tmp_path) == set()


def test_what_an_earlier_process_wrote_serves_again_and_its_leftovers_go(opened, tmp_path):
    with opened() as folders:
        folder = folders.hold("a + b")
    (tmp_path / "served" / f".{folder.key}.new").mkdir()
    before = (folder.path / "adapter_model.safetensors").stat().st_mtime_ns
    with opened() as folders:
        assert folders.hold("a + b") == folder
    assert (folder.path / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert on_disk(tmp_path) == {folder.key}


def test_a_folder_that_may_not_have_reached_the_disk_is_made_again(opened, tmp_path):
    with opened() as folders:
        folder = folders.hold("a + b")
    (folder.path / SETTLED).unlink()
    (folder.path / "adapter_model.safetensors").write_bytes(b"")
    with opened() as folders:
        assert on_disk(tmp_path) == set()
        assert (folders.hold("a + b").path / "adapter_model.safetensors").stat().st_size > 0


def test_two_servers_do_not_share_the_folders(opened):
    with opened(), pytest.raises(HubLocked, match="another process"), opened():
        pass


def test_no_folder_is_seen_before_it_is_whole(hub, opened, tmp_path):
    found, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            for path in (tmp_path / "served").glob("*"):
                if not path.name.startswith("."):
                    rank = json.loads((path / "adapter_config.json").read_text())["r"]
                    found.add((path.name, rank, (path / "adapter_model.safetensors").stat().st_size))

    with opened() as folders, ThreadPoolExecutor(5) as threads:
        watching = threads.submit(watch)
        names = [f"0.{weight}*{name} + 0.5*d" for weight in range(1, 9) for name in "abc"]
        # each is asked for twice at once, and made once
        keys = {folder.key for folder in threads.map(folders.hold, [name for name in names for _ in range(2)])}
        done.set()
        watching.result()
    assert len(keys) == len(names)
    assert found
    # every folder has the same shapes, and nobody saw a shorter file
    assert len({size for _, _, size in found}) == 1


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


def test_a_formula_becomes_a_folder_in_an_engine_that_has_no_training_package(tmp_path, hub):
    """vLLM's environment has neither joblib, cma, peft nor accelerate: no module on the way may import them."""
    script = """
import sys
sys.modules.update(dict.fromkeys(["joblib", "cma", "peft", "accelerate"]))
from pathlib import Path
from loraweave import Hub
from loraweave.extensions.engines.folders import Folders
print(Folders(Hub(sys.argv[1]), Path(sys.argv[2]), max_rank=8).hold("0.5*a + 0.25*b").canonical)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "hub"), str(tmp_path / "served")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "0.5*a + 0.25*b", ran.stderr[-2000:]
