"""vLLM computes what the live mixture says; what its loader takes is in tests/hub/test_export.py."""

from pathlib import Path

import engines
import pytest
import torch
from exported_mixtures import pool_mixture

from loraweave.hub import base

SCRIPT = Path(__file__).parents[2] / "engine_scripts" / "vllm_answers.py"


@pytest.mark.slow
def test_vllm_computes_the_live_mixture_of_the_pool(tmp_path):
    mixture = pool_mixture()
    report = mixture.merged.export(tmp_path / "out", target="vllm")
    given = {"model": str(base._embedded_folder()), "adapter": str(report.folder), "prompts": mixture.prompts}
    given |= {"vocabulary": mixture.model.config.vocab_size}
    given |= {"max_lora_rank": int(report.flags[report.flags.index("--max-lora-rank") + 1])}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    without, said = engines.run("vllm", SCRIPT, given, timeout=500, OMP_NUM_THREADS="1", **settings)
    for ours, theirs, base_only in zip(mixture.live(), map(torch.tensor, said), map(torch.tensor, without), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        assert (theirs - base_only).abs().max() > 0.3
