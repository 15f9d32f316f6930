"""Clients in processes of flower's simulation, one of which dies."""

from pathlib import Path

import engines
import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "engine_scripts" / "flower_rounds.py"


@pytest.mark.slow
def test_a_round_in_flower_is_the_round_in_this_process_and_outlives_a_client_that_dies(
    tiny_llama, tokenizer, clients, tmp_path
):
    tiny_llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    clients = {"dies": clients["double"], "raises": clients["double"], **clients}
    given = {"root": str(ROOT), "model": str(tmp_path), "clients": clients}
    # ray's own processes would else yield to all others
    said = engines.run("flower", SCRIPT, given, timeout=500, RAY_worker_niceness="0")
    assert said["left_out"] == {"dies": "its process died", "raises": "ValueError: its disk is full"}
    assert list(said["losses"][0]) == ["upper", "double", "count"]
    assert said["losses"][0] == said["losses"][1]
    assert said["ranks"][0] == said["ranks"][1] == [2, 2, 1]
    assert said["flower"] == said["here"]
