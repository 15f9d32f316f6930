"""Measures routers: what they cost, and what they are worth over the adapters of examples/pool.

    python benchmarks/routers.py cost forward                     8 rows of 128 tokens
    python benchmarks/routers.py cost generate                    32 greedy tokens with KV cache after a prompt of 32
    python benchmarks/routers.py cost train --rows 4 --tokens 64  (forward and backward of a step; xlora alone)
    python benchmarks/routers.py quality --out runs/routers
    python benchmarks/routers.py quality --out runs/routers --routers base oracle arrow --items 4
    python benchmarks/routers.py quality --out runs/routers --report      (the table of what has been measured so far)
    python benchmarks/routers.py quality --out runs/routers --together    (writes benchmarks/data/routers.json, or --kept)

`cost`: time relative to the base model's own pass, or its forward and backward through the activations, for arrow and xlora
beside peft's and for weights given by token. Opening an activation is part of our time. Logits and gradients are compared
first, and nothing is reported where they differ.

`quality`: right answers on test inputs of the pool's own tasks (nobody says which adapter an input is for), on unseen tasks
and on tasks that join two skills. Beside every router: the base model, the task's own adapter (`oracle`), the adapter of
the lowest loss over all tasks (`best_single`), all adapters alike (`uniform`), the adapter whose examples are nearest to the
prompt (`retrieved_first`), and one LoRA trained on all tasks (`one_lora`) on as many rows as a router is. Of adapters whose
tasks' rows are in --data. Every measurement and every trained router is kept in --out, so that an interrupted run goes on.
"""

from __future__ import annotations

import _commands
import _router_cost
import _router_quality

COMMANDS = {"cost": _router_cost, "quality": _router_quality}


if __name__ == "__main__":
    _commands.run(__doc__, COMMANDS)
