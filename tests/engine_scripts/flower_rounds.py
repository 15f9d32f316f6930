"""A round in flower's simulation in which a client's process dies, and the same without it in this process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

given = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, given["root"])

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from loraweave.extensions.federated import federate  # noqa: E402
from loraweave.extensions.federated.strategies.hetlora import Hetlora  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Deadly(Hetlora):
    """HetLoRA in which the process of one client dies, and another raises."""

    def train(self, course, order):
        if order.client == "dies":
            os._exit(1)
        if order.client == "raises":
            raise ValueError("its disk is full")
        return super().train(course, order)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(given["model"]), AutoTokenizer.from_pretrained(given["model"])
    settings = {"rank": 2, "steps": 2, "batch_size": 2, "rounds": 1, "ranks": {"count": 1}, "progress": False}
    clients = given["clients"]
    flower = federate(model, tokenizer, clients, strategy=Deadly(), backend="flower", **settings)
    others = {name: rows for name, rows in clients.items() if name in flower.rounds[0].losses}
    here = federate(model, tokenizer, others, strategy="hetlora", **settings)
    said = {
        "flower": flower.adapter.hash,
        "here": here.adapter.hash,
        "losses": [dict(each.rounds[0].losses) for each in (flower, here)],
        "ranks": [[int(own["rank"]) for own in each.state.own.values()] for each in (flower, here)],
        "left_out": dict(flower.rounds[0].left_out),
    }
    Path(sys.argv[2]).write_text(json.dumps(said))
