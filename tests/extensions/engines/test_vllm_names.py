"""The names of formulas in vLLM's table, without vLLM: one for each content, listed once, and never another content's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_hubs
import torch

import loraweave as lw
from loraweave.extensions.engines import vllm
from loraweave.extensions.engines.folders import Folders


@dataclass(eq=False)
class Request:
    """A stand-in for vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders over a hub of `policy` and `style`."""
    monkeypatch.setattr(vllm, "_request_type", lambda: Request)
    hub = lw.Hub(tmp_path / "hub")
    for seed, name in enumerate(("policy", "style")):
        hub.add(tiny_hubs.adapter(seed, name))
    made = Folders(hub, tmp_path / "served", max_rank=8)
    made.hub = hub
    yield made
    made.close()


@pytest.fixture
def ask(folders):
    """ask(names, resolver, name): what vLLM does with a name of an HTTP request that its table lacks."""

    def ask(names, resolver, name):
        vllm._asked.set(vllm._NOTHING)
        if name not in names:
            names[name] = resolver._request(folders.hold(name))
        return names[name]

    return ask


@pytest.fixture
def resolver(folders):
    made = vllm.Resolver()
    made._folders = folders
    return made


def test_one_composition_is_listed_once_whatever_its_spelling(folders, resolver, ask):
    names = vllm._Names({}, folders)
    spellings = ["0.5*policy + style", "style + 0.5*policy", "style+.5 * policy", "0.5 * (policy + 2*style)"]
    requests = [ask(names, resolver, spelling) for spelling in spellings]
    assert len(set(map(id, requests))) == 1
    other = ask(names, resolver, "policy")
    assert [request.lora_name for request in names.values()] == [requests[0].lora_name, other.lora_name]
    assert len({request.lora_int_id for request in names.values()}) == 2


def test_weights_that_change_during_training_have_a_name_each_that_no_others_get(folders, resolver, ask):
    names, steps = vllm._Names({}, folders), {}
    for step in range(3):
        folders.hub.add(tiny_hubs.adapter(10 + step, "policy"), name="policy", replace=True)
        request = ask(names, resolver, "policy")
        steps[request.lora_name] = step, request.lora_int_id
        # what vLLM reads under the name are the weights of this step
        read = lw.Adapter.from_pretrained(Path(request.lora_path)).delta("layer")
        torch.testing.assert_close(read, folders.hub["policy"].delta("layer"))
        # the name with the hash answers as long as these are the weights, and the ones before do not
        assert folders.hold(request.lora_name).name == request.lora_name
        for earlier in [name for name, (number, _) in steps.items() if number < step]:
            vllm._asked.set(vllm._NOTHING)
            assert earlier not in names
            with pytest.raises(lw.LoraweaveError):
                folders.hold(earlier)
    assert len(steps) == len({number for _, number in steps.values()}) == 3
    # a rollback is the first content, under its first name
    folders.hub.rollback("policy", 2)
    assert steps[ask(names, resolver, "policy").lora_name][0] == 0
