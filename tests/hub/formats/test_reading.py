"""Which adapter of a folder is read: the one inside or above others, and none that somebody writes to meanwhile."""

import os

import peft_models
import pytest
import torch
from peft_models import lora
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats import peft
from loraweave.hub.hub import Hub

LAYER = "model.layers.0.q_proj"


def weights(value):
    return lora(LAYER, a=torch.full((1, 3), value), b=torch.ones(2, 1))


def put(folder, value=1.0):
    return peft_models.put(folder, weights(value), r=1, lora_alpha=1)


def value_of(source):
    return float(Adapter.from_pretrained(source).layers[LAYER].a_RI[0, 0])


@pytest.mark.parametrize("below", ["checkpoint-500", "final", "adapter", "runs/one/adapter"])
def test_the_one_adapter_below_a_folder_is_found_and_bears_the_folders_name(tmp_path, below):
    put(tmp_path / "run" / below, 3.0)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    assert value_of(tmp_path / "run") == 3.0
    assert Adapter.from_pretrained(tmp_path / "run").name == "run"


def test_an_adapter_above_its_checkpoints_is_the_one_that_is_meant(tmp_path):
    put(tmp_path, 1.0)
    put(tmp_path / "checkpoint-500", 2.0)
    assert value_of(tmp_path) == 1.0


def test_the_weights_of_an_adapter_alone_are_refused_with_its_folder(tmp_path):
    put(tmp_path / "adapter")
    with pytest.raises(AdapterUnsupported, match=r"the weights alone .* give .*/adapter$"):
        Adapter.from_pretrained(tmp_path / "adapter" / "adapter_model.safetensors")


def test_several_adapters_are_refused_and_listed_with_the_way_out(tmp_path):
    for step in (500, 1000):
        put(tmp_path / f"checkpoint-{step}")
    with pytest.raises(
        AdapterUnsupported, match=r"2 folders.*checkpoint-1000, checkpoint-500; give the path of one"
    ) as refused:
        Adapter.from_pretrained(tmp_path)
    assert str(refused.value).endswith(f"or store all: `loraweave hub add-tree {tmp_path}`")


def test_hidden_folders_links_and_what_lies_too_deep_are_not_entered(tmp_path):
    put(tmp_path / "elsewhere", 1.0)
    run = tmp_path / "run"
    put(run / ".cache", 1.0)
    put(run / "a" / "b" / "c" / "d", 1.0)
    (run / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorrupt, match=r"run: no adapter_config\.json"):
        Adapter.from_pretrained(run)


def test_a_folder_of_very_many_files_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("loraweave.hub.formats._reading.MAX_ENTRIES", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("")
    with pytest.raises(AdapterUnsupported, match=r"more than 3 files; give the adapter's own folder"):
        Adapter.from_pretrained(tmp_path)


def test_a_training_checkpoint_is_read_without_its_optimizer(tmp_path):
    put(tmp_path, 2.0)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "global_step500"):
        # whatever opens one of these hangs: nobody writes to it
        (tmp_path / name).mkdir() if name.startswith("global") else os.mkfifo(tmp_path / name)
    assert value_of(tmp_path) == 2.0


def test_the_output_folder_of_llama_factory_is_the_adapter_at_its_top(tmp_path):
    put(tmp_path, 2.0)
    for step in (100, 200):
        put(tmp_path / f"checkpoint-{step}", 1.0)
    for name in ("all_results", "train_results", "trainer_state", "tokenizer", "special_tokens_map"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "trainer_log.jsonl").write_text('{"loss": 1.0}\n')
    (tmp_path / "llamaboard_config.yaml").write_text("top.booster: none\n")
    (tmp_path / "training_args.bin").write_bytes(b"no pickle")
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: peft\nlicense: other\nbase_model: a/base\ntags:\n- llama-factory\n- lora\n---\n"
    )
    assert value_of(tmp_path) == 2.0
    assert "llama-factory" in Adapter.from_pretrained(tmp_path).card["tags"]


@pytest.fixture
def folder(tmp_path):
    return put(tmp_path / "adapter")


def replaced(folder):
    save_file(weights(2.0), folder / "new.safetensors")
    os.replace(folder / "new.safetensors", folder / "adapter_model.safetensors")


def rewritten(folder):
    text = (folder / "adapter_config.json").read_text().replace('"lora_alpha": 1', '"lora_alpha": 2')
    (folder / "adapter_config.json").write_text(text)


def cut_off(folder):
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(100)


def added(folder):
    (folder / "loraweave.json").write_text("{}")


def rewritten_at_the_same_time(folder):
    path = folder / "adapter_config.json"
    status = path.stat()
    path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 2'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, rewritten, rewritten_at_the_same_time, cut_off, added])
@pytest.mark.parametrize("moment", ["gather", "_layers_of"])
def test_a_change_between_config_and_the_end_is_named_and_nothing_is_stored(folder, tmp_path, monkeypatch, change, moment):
    own = getattr(peft, moment)

    def meanwhile(*arguments):
        change(folder)
        return own(*arguments)

    monkeypatch.setattr(peft, moment, meanwhile)
    with Hub(tmp_path / "hub") as hub:
        with pytest.raises(AdapterCorrupt, match=r"changed while it was read.*read the adapter again"):
            hub.add(folder)
        assert len(hub) == 0


def test_other_files_may_change_while_the_adapter_is_read(folder, monkeypatch):
    own = peft.gather

    def meanwhile(*arguments):
        (folder / "optimizer.pt").write_bytes(b"x")
        return own(*arguments)

    monkeypatch.setattr(peft, "gather", meanwhile)
    assert Adapter.from_pretrained(folder).rank == 1
