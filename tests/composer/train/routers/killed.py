"""A training that the test beside it kills: python killed.py checkpoint-folder steps last; after `last` steps it waits."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraweave.composer.composer import Composer
from loraweave.extensions.routers.routers.mole import Mole
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors

ROWS = [{"input_ids": [3 + i, 4, 5 + i, 6], "labels": [-100, -100, 5 + i, 6]} for i in range(7)]
SETTINGS = {
    "batch_size": 2,
    "lr": 0.05,
    "checkpoint_every": 1,
    "evaluation": ROWS[:3],
    "evaluate_every": 2,
    "progress": False,
}


def train(folder: Path, steps: int, *, seed: int) -> Mole:
    """A router, drawn from `seed`, after `steps` steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, initializer_range=0.3, **sizes)).eval()
    model.name_or_path = "tiny"
    layer = "model.layers.0.self_attn.q_proj"
    pool = ExpertPool([Adapter(name, "tiny", {layer: Factors(torch.randn(2, 16), torch.randn(16, 2))}) for name in "ab"])
    torch.manual_seed(seed)
    return Mole(pool).fit(Composer(model, pool), ROWS, steps=steps, checkpoint=folder, **SETTINGS)


if __name__ == "__main__":
    losses, taken = Mole.losses, count()

    def held(router, step):
        if next(taken) == int(sys.argv[3]):
            print("held", flush=True)
            sys.stdin.read()
        return losses(router, step)

    Mole.losses = held
    train(Path(sys.argv[1]), int(sys.argv[2]), seed=0)
