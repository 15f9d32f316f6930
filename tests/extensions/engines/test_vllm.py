"""vLLM computes what the live mixture says; what its loader takes is in test_vllm_folder.py.

That it does on the real model, too, is in test_vllm_server.py, whose server makes such folders.
"""

from pathlib import Path

import engines
import pytest
import torch
from exported_mixtures import tiny_mixture

SCRIPT = Path(__file__).parents[2] / "engine_scripts" / "vllm_answers.py"
# heads of 32 or more, the least that its CPU attention has
SIZES = {
    "gemma": {},
    "phi": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen2": {"num_attention_heads": 2},
    "qwen3": {},
}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # the engine runs in the script's own process, whose models it loads one after the other
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: (mixture, vLLM's log-probabilities without the adapter, with it)}; one process runs them all."""
    folder = tmp_path_factory.mktemp("vllm")
    mixtures, jobs = {}, []
    for case, sizes in SIZES.items():
        mixture = mixtures[case] = tiny_mixture(case, **sizes)
        mixture.model.save_pretrained(folder / case)
        report = mixture.merged.export(folder / f"{case} adapter", target="vllm")
        given = {"model": str(folder / case), "adapter": str(report.folder)}
        given |= {"prompts": mixture.prompts, "vocabulary": mixture.model.config.vocab_size}
        jobs.append({**given, "max_lora_rank": int(report.flags[report.flags.index("--max-lora-rank") + 1])})
    said = engines.run("vllm", SCRIPT, jobs, timeout=900, **SETTINGS)
    return {case: (mixtures[case], *each) for case, each in zip(SIZES, said, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("case", SIZES)
def test_vllm_computes_the_live_mixture(answers, case):
    mixture, without, said = answers[case]
    for ours, theirs, base_only in zip(mixture.live(), map(torch.tensor, said), map(torch.tensor, without), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        assert (theirs - base_only).abs().max() > 0.3
