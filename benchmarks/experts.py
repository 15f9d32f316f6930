"""Measures trainable mixtures of LoRA experts: what they cost, and what they are worth beside one LoRA.

    python benchmarks/experts.py cost step            a training step of 8 rows of 64 tokens, top 2 of 8 experts of rank 8
    python benchmarks/experts.py cost decode          32 greedy tokens with KV cache after a prompt of 32
    python benchmarks/experts.py cost memory          bytes that a step keeps between forward and backward
    python benchmarks/experts.py score --out runs/experts
    python benchmarks/experts.py score --out runs/experts --kinds one_lora mola_8888 --seeds 0
    python benchmarks/experts.py score --out runs/experts --report       (the table of what has been measured so far)
    python benchmarks/experts.py score --out runs/experts --together     (writes benchmarks/data/experts.json)

`cost`: time relative to one LoRA in peft of the rank that is active for a token. Beside it: the base alone, one LoRA of as
many parameters, and the same experts and gates as the published code computes them (a loop over experts with masks), in
mergoo's layer and in MoE-PEFT's, where these are installed (`pip install --no-deps mergoo moe_peft`, and datasets). All
models share their base's weights. Logits and gradients are compared first, and nothing is reported where they differ.

`score`: right answers on test inputs of tasks of the pool after joint training, each recipe at about as many parameters, on
as many rows. Beside them: the base, one LoRA of at least as many parameters as any recipe (`one_lora`), one of the rank
that is active in a token (`one_lora_active`), and one LoRA for each task, trained alone for its share of the steps and
asked for its own task (`separate`). Every kind is trained at 3e-3 and, with that in its name, at 1e-3, a few at 3e-4: kinds
are compared at the rate at which the last steps, whose rows had not been seen before, had the lower loss. Those that end in
`_alone` are a whole mixture for each task, trained on as many of its rows as the joint one: what is right together above
that is interference. Those that end in `_then` go on with other tasks (--then), and are asked for both: retention. Every
measurement is kept in --out, so that an interrupted run goes on.
"""

from __future__ import annotations

import _commands
import _experts_cost
import _experts_score

COMMANDS = {"cost": _experts_cost, "score": _experts_score}


if __name__ == "__main__":
    _commands.run(__doc__, COMMANDS)
