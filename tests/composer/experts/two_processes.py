"""A training in as many processes as were launched, which the test beside it starts: two_processes.py folder."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import loraweave as lw

ROWS = [
    {"input_ids": [3 + i, *[9] * (1 + i % 3), 5 + i, 6], "labels": [-100, *[-100] * (1 + i % 3), 5 + i, 6]} for i in range(7)
]
SETTINGS = {"steps": 3, "batch_size": 4, "warmup": 0, "evaluation": ROWS[:3], "evaluate_every": 2, "progress": False}


def trained(**settings):
    """The same model in every process, trained on the same rows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, initializer_range=0.3, **sizes)).double().eval()
    made = lw.experts("mola", model, num_experts=(2, 3), rank=2, target_modules=("q_proj", "down_proj"))
    return made.fit(ROWS, **SETTINGS, **settings)


if __name__ == "__main__":
    import torch.distributed as dist

    model = trained()
    state = {name: value.contiguous() for name, value in model.expert_state().items()}
    save_file(state, Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    report = model.training_report
    (Path(sys.argv[1]) / f"{dist.get_rank()}.txt").write_text(repr((report.losses, report.evaluations)))
    dist.destroy_process_group()
