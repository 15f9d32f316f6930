"""The same mixture of two adapters in peft and in loraweave, on the real base model: logits side by side.

    python examples/beside_peft.py

peft merges the two adapters exactly with `combination_type="cat"` (plain LoRA, equal scales: a case in which it is right).
loraweave mixes them live, writes them into the weights, and merges them. Prints the largest difference of the logits,
relative to the largest logit.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

import loraweave as lw

POOL = Path(__file__).parent / "pool"
WEIGHTS = {"passive": 0.7, "negation": 0.7}
TEXT = "Rewrite the sentence in the passive voice and negate it.\nInput: The actor saw the judge.\nOutput:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=POOL)
    differences = compare(parser.parse_args().pool)
    for way, difference in differences.items():
        print(f"{way:28s} {difference:.2e}")


@torch.no_grad()
def compare(pool: Path) -> dict[str, float]:
    """{way: largest difference to peft, relative to the largest logit}."""
    model, tokenizer = lw.load_base()
    inputs = tokenizer(TEXT, return_tensors="pt")
    expected = _with_peft(copy.deepcopy(model), pool, inputs)
    adapters = [lw.Adapter.from_pretrained(pool / name) for name in WEIGHTS]
    engine = lw.Composer(model, adapters, tokenizer=tokenizer)
    found = {}
    with engine.activate(WEIGHTS):
        found["live mixture"] = model(**inputs).logits
    with engine.activate([WEIGHTS, None]):
        pair = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
        found["live, one row of a batch"] = model(**pair).logits[:1]
    with engine.fused(WEIGHTS):
        found["fused into the weights"] = model(**inputs).logits
    merged = lw.merge(adapters, list(WEIGHTS.values()), name="both")
    with lw.Composer(model, [merged]).activate({"both": 1.0}):
        found["merged adapter"] = model(**inputs).logits
    return {way: float((logits - expected).abs().max() / expected.abs().max()) for way, logits in found.items()}


def _with_peft(model: Any, pool: Path, inputs: Any) -> torch.Tensor:
    from peft import PeftModel

    first, second = WEIGHTS
    wrapped = PeftModel.from_pretrained(model, str(pool / first), adapter_name=first)
    wrapped.load_adapter(str(pool / second), adapter_name=second)
    wrapped.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "both", combination_type="cat")
    wrapped.set_adapter("both")
    return wrapped.eval()(**inputs).logits


if __name__ == "__main__":
    main()
