"""`loraweave load`: the folder that a formula becomes, and the refusals before and after."""

import pytest
from command_line import adapter, call

import loraweave as lw


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        for seed, name in enumerate(("left", "right")):
            opened.add(adapter(name, seed))
        yield opened


def test_a_formula_is_written_before_a_server_is_asked(hub, here):
    done = call("load", "0.5*left + 0.5*right", "--into", "sglang", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert "nothing answers at http://127.0.0.1:1/load_lora_adapter" in done.stderr
    [folder] = [path for path in (here / "served").iterdir() if path.is_dir()]
    assert lw.Adapter.from_pretrained(folder).rank == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["left + rigth", "--into", "lorax"], "did you mean 'right'"),
        (["left", "--into", "vllm"], "vLLM asks loraweave by itself"),
        (["left + right", "--into", "lorax", "--max-rank", "1"], "above the limit of 0.001"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(hub, words, said):
    done = call("load", *words, "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert said in done.stderr
