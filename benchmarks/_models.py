"""What is timed: the default base, adapters of the example pool or random ones, the same in peft, and passes over tokens."""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import loraweave as lw
from benchmarks._run import Run
from benchmarks._timing import Gate

NUM_ADAPTERS = 20
RANK = 8
ATTENTION = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIMIT = 1e-4


Context = Callable[[], AbstractContextManager[Any]]


def base_model() -> tuple[Any, Any]:
    """The default base model, or that of --base, in float32, which learns nothing, and its tokenizer."""
    model, tokenizer = lw.load_base(dtype=torch.float32)
    return model.requires_grad_(False), tokenizer


def adapters(run: Run, model: Any, targets: str, *, rank: int = RANK) -> list[lw.Adapter]:
    """20 adapters: the example pool's where it has as many of that rank and `targets` is "qv", else random ones."""
    folders = run.adapters()[:NUM_ADAPTERS]
    if targets == "qv" and rank == RANK and len(folders) == NUM_ADAPTERS:
        return [lw.Adapter.from_pretrained(folder) for folder in folders]
    return random_adapters(model, NUM_ADAPTERS, targets, run.seed, rank=rank)


def random_adapters(model: Any, count: int, targets: str, seed: int, *, rank: int = RANK) -> list[lw.Adapter]:
    """Random ones named random00 and so on."""
    return [random_adapter(model, f"random{number:02d}", targets, seed, rank=rank) for number in range(count)]


def random_adapter(
    model: Any, name: str, targets: str, seed: int, *, rank: int = RANK, blocks: int | None = None
) -> lw.Adapter:
    """Factors of the size of trained ones, a function of name and seed; on all of the model's blocks or the first ones."""
    endings = ALL if targets == "all" else ATTENTION
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    layers = {
        layer: random_factors(module.out_features, module.in_features, rank, generator)
        for layer, module in model.named_modules()
        if layer.endswith(endings) and (blocks is None or int(layer.split(".layers.")[1].split(".")[0]) < blocks)
    }
    return lw.Adapter(name, model.name_or_path, layers)


def random_factors(num_out: int, num_in: int, rank: int, generator: torch.Generator) -> lw.Factors:
    a_RI = torch.randn(rank, num_in, generator=generator) * num_in**-0.5
    return lw.Factors(a_RI, torch.randn(num_out, rank, generator=generator) * 0.02)


def keep_blocks(model: Any, count: int) -> None:
    """Leaves out all blocks but the first, and the output head, which would outweigh so few."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 64, bias=False).requires_grad_(False)


def tokens(model: Any, rows: int, count: int, seed: int) -> Tensor:
    """ids_BT at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, count), generator=generator)


def in_peft(model: Any, adapters: Sequence[lw.Adapter], *, trainable: bool = False) -> Any:
    """A PeftModel around a copy of the model, with all the adapters."""
    copied = copy.deepcopy(model)
    found: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for adapter in adapters:
            path = adapter.save_pretrained(Path(folder) / adapter.name)
            if found is None:
                found = peft.PeftModel.from_pretrained(copied, path, adapter_name=adapter.name, is_trainable=trainable)
            else:
                found.load_adapter(path, adapter_name=adapter.name, is_trainable=trainable)
    return found.eval()


def mix_in_peft(model: Any, mixture: Mapping[str, float]) -> None:
    """Activates the experts of a mixture in a PeftModel and sets their weights."""
    model.base_model.set_adapter(list(mixture))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in mixture.items():
                module.set_scale(name, weight)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def changes(what: str, change: float) -> Gate:
    """Equal answers prove nothing where the adapters change nothing: `change` has to be far above the limit."""
    return Gate(f"limit over the change that the {what} make", LIMIT / max(change, 1e-30), 0.1)


def prefill(forward: Callable[..., Any], ids_BT: Tensor, context: Context = nullcontext) -> Callable[[], None]:
    """All tokens at once, and logits of the last one. Nothing is cached."""
    # an index: of a slice, the head of a frozen model makes a batched product that copies the vocabulary for every row
    last = torch.tensor([ids_BT.shape[1] - 1])

    @torch.inference_mode()
    def run() -> None:
        with context():
            forward(input_ids=ids_BT, use_cache=False, logits_to_keep=last)

    return run


def generate(
    forward: Callable[..., Any], prompt_BT: Tensor, count: int, context: Context = nullcontext, *, cached: bool = True
) -> Callable[[], None]:
    """Greedy tokens with the key-value cache, the prompt's pass among them; else all tokens again for each."""

    @torch.inference_mode()
    def run() -> None:
        token_BT, cache = prompt_BT, None
        with context():
            for _ in range(count):
                if cached:
                    output = forward(input_ids=token_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token_BT, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
                else:
                    output = forward(input_ids=token_BT, use_cache=False, logits_to_keep=1)
                    token_BT = torch.cat([token_BT, output.logits[:, -1:].argmax(dim=-1)], dim=1)

    return run


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Of all their gradients together."""
    return torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum().sqrt()


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]
