"""Measures routers over the adapters of examples/pool.

    python benchmarks/routers.py cost forward
    python benchmarks/routers.py quality --out runs/routers
    python benchmarks/routers.py quality --out runs/routers --routers base oracle arrow --items 4
    python benchmarks/routers.py quality --out runs/routers --report      (the table of what has been measured so far)
    python benchmarks/routers.py quality --out runs/routers --together    (writes benchmarks/data/routers.json)

`cost`: what they add to the time of the base model, beside peft.

`quality`: right answers on test inputs of the pool's own tasks (nobody says which adapter an input is for), on unseen tasks
and on tasks that join two skills. Beside every router: the base model, the task's own adapter (`oracle`), the adapter of
the lowest loss over all tasks (`best_single`), all adapters alike (`uniform`), the adapter whose examples are nearest to the
prompt (`retrieved_first`), and one LoRA trained on all tasks (`one_lora`) on as many rows as a router is. Of adapters whose
tasks' rows are in --data. Every measurement and every trained router is kept in --out, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse

import _router_cost
import _router_quality

COMMANDS = {"cost": _router_cost, "quality": _router_quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name))
    options = parser.parse_args()
    COMMANDS[options.command].main(options)


if __name__ == "__main__":
    main()
