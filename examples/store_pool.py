"""Writes a pool in fewer bytes: the same PEFT folders in 8-bit floats, with as much of each update as a size allows.

    python examples/store_pool.py --pool runs/qwen/pool --out examples/qwen

Each layer keeps the singular components of its update with the most energy a byte, at least one, so that the ranks of
layers differ. Factors are float8_e4m3fn, scaled by powers of two into its range, which lora_alpha takes back. Both are
plain PEFT: `lw.Adapter.from_pretrained`, `hub.add_many` and peft read the folders as any others. A card gets what was lost.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

import loraweave as lw
from loraweave.lowrank import algebra

DTYPE = torch.float8_e4m3fn
# powers of two to which the largest entry of a factor is brought: E4M3 holds up to 448, and is coarser below 2^-6
LARGEST = 8
WEIGHTS, CONFIG, README = "adapter_model.safetensors", "adapter_config.json", "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a smaller one for each")
    parser.add_argument("--kilobytes", type=int, default=385, help="the most for an adapter's factors, in 1,000 bytes")
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.pool.glob(f"*/{CONFIG}"))
    for folder in track(folders, description="storing"):
        error = store(lw.Adapter.from_pretrained(folder), options.out / folder.name, options.kilobytes * 1000)
        print(f"{folder.name}: relative error {error:.3f}")


def store(adapter: lw.Adapter, folder: Path, num_bytes: int) -> float:
    """Writes the adapter with at most that many bytes of factors; returns the relative error of its whole update."""
    cut = strongest(adapter, num_bytes)
    cut.save_pretrained(folder)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    config["alpha_pattern"], rounded = {}, {}
    for layer, factors in cut.layers.items():
        key, exponent = f"base_model.model.{layer}", 0
        for part in ("lora_A.weight", "lora_B.weight"):
            values = tensors[f"{key}.{part}"]
            up = LARGEST - math.frexp(float(values.abs().max()))[1]
            rounded[f"{key}.{part}"] = torch.ldexp(values, torch.tensor(up)).to(DTYPE)
            exponent += up
        config["alpha_pattern"][f"^{layer.replace('.', chr(92) + '.')}"] = factors.rank * 2.0**-exponent
    save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    readme = (folder / README).read_text(encoding="utf-8")
    (folder / README).write_text(readme.replace("float32", str(DTYPE).removeprefix("torch.")), encoding="utf-8")
    error = distance(lw.Adapter.from_pretrained(folder), adapter)
    sidecar = folder / "loraweave.json"
    said = json.loads(sidecar.read_text(encoding="utf-8"))
    sidecar.write_text(json.dumps({**said, "stored": {"relative_error": round(error, 4)}}, ensure_ascii=False, indent=1))
    return error


def strongest(adapter: lw.Adapter, num_values: int) -> lw.Adapter:
    """The adapter with the components of most energy a value, at least one of each layer, that have so many values."""
    parts = {layer: algebra.components(factors) for layer, factors in adapter.layers.items()}
    sizes = {layer: sum(factors.a_RI.shape[1:] + factors.b_OR.shape[:1]) for layer, factors in adapter.layers.items()}
    offered = [(algebra.norm(part) ** 2 / sizes[layer], layer) for layer, own in parts.items() for part in own[1:]]
    left, ranks = num_values - sum(sizes.values()), dict.fromkeys(parts, 1)
    for _, layer in sorted(offered, reverse=True):
        if sizes[layer] <= left:
            left, ranks[layer] = left - sizes[layer], ranks[layer] + 1
    return replace(adapter, layers={layer: algebra.add(own[: ranks[layer]]) for layer, own in parts.items()})


def distance(left: lw.Adapter, right: lw.Adapter) -> float:
    """The norm of the updates' difference relative to that of the right one's."""
    lost = sum(algebra.norm(algebra.add([left.layers[n], algebra.negate(right.layers[n])])) ** 2 for n in right.layers)
    return math.sqrt(lost / sum(algebra.norm(factors) ** 2 for factors in right.layers.values()))


if __name__ == "__main__":
    main()
