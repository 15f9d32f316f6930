"""What a training step and decoding with trainable experts cost, beside one LoRA in peft and the same experts elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import peft
import torch
from _adapters import ALL, ATTENTION, base_model, difference
from _experts_peers import Loop, experts_of, in_layers, lora_in_peft, mergoo_layer, moe_peft_layer, sharing
from _ratios import Gate, Way, compare, console, require
from rich.table import Table
from torch import Tensor, nn

import loraweave as lw

LR = 1e-4
CLIP = 1.0
PROMPT_TOKENS = 32
NEW_TOKENS = 32
LIMIT = 1e-4


class Setting:
    """One base with our experts, and models that share its weights with the same experts, or a LoRA of the same size.

    Experts are live only in calls of our model, so that the base itself is a way too. `plain` has no balance loss, which
    the others have not either.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        model, _ = base_model()
        model.requires_grad_(False)
        self.base = sharing(model)
        endings = ALL if options.targets == "all" else ATTENTION
        shared = {
            "num_experts": (options.experts,),
            "top_k": options.top_k,
            "rank": options.rank,
            "target_modules": endings,
            "seed": options.seed,
        }
        self.plain = lw.experts("mola", model, balance=0.0, **shared)
        randomise(self.plain, options.seed)
        self.balanced = lw.experts("mola", sharing(model), **shared)
        self.balanced.load_state_dict(self.plain.expert_state(), strict=False)
        kinds = {
            "a loop over experts with masks": Loop,
            "mergoo's layer": mergoo_layer(),
            "MoE-PEFT's layer": moe_peft_layer(),
        }
        self.elsewhere = {name: in_layers(self.plain, kind) for name, kind in kinds.items() if kind is not None}
        active, equal = options.top_k * options.rank, options.experts * options.rank
        self.loras = {
            f"peft, one LoRA of rank {rank}, {what}": lora_in_peft(model, rank, endings, options.seed)
            for rank, what in ((active, "as active"), (equal, "as many parameters"))
        }
        generator = torch.Generator().manual_seed(options.seed)
        self.ids_BT = torch.randint(0, model.config.vocab_size, (options.rows, options.tokens), generator=generator)

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Every model that has something to train, by its label."""
        return {"loraweave": self.plain, "loraweave, with its balance loss": self.balanced, **self.loras, **self.elsewhere}


def randomise(made: Any, seed: int) -> None:
    """Gives the experts values of the size of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, factors, _ in experts_of(made):
            factors.b_SO.copy_(0.02 * torch.randn(factors.b_SO.shape, generator=generator))


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def gates(setting: Setting) -> list[Gate]:
    """Logits and gradients of our experts against the same ones in every other library's layers."""
    ids_BT, found, own = setting.ids_BT[:2], [], setting.plain.eval()
    logits, base = (model(input_ids=ids_BT).logits.detach() for model in (own, setting.base))
    norm = gradient_norm(own, ids_BT)
    for name, model in setting.elsewhere.items():
        found.append(
            Gate(f"logits equal those with {name}", difference(model(input_ids=ids_BT).logits.detach(), logits), LIMIT)
        )
        found.append(Gate("and so does the norm of the gradients", difference(gradient_norm(model, ids_BT), norm), LIMIT))
    # equal answers prove nothing where the experts change nothing
    return [*found, Gate("limit over the change that the experts make", LIMIT / difference(logits, base), 0.1)]


def gradient_norm(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Of all parameters that learn; without gradients afterwards."""
    loss_of(model, ids_BT).backward()
    parameters = learning(model).values()
    norm = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum().sqrt()
    for parameter in parameters:
        parameter.grad = None
    return norm


def step_way(model: nn.Module, ids_BT: Tensor) -> Way:
    """Forward, backward, clipping and AdamW."""
    parameters = list(learning(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    def run() -> None:
        loss_of(model, ids_BT).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return Way(run, model.train)


def base_way(model: Any, ids_BT: Tensor) -> Way:
    """The frozen base's forward, and its backward through the activations."""

    def run() -> None:
        embedded_BTI = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        model(inputs_embeds=embedded_BTI, labels=ids_BT, use_cache=False).loss.backward()

    return Way(run)


def decode_way(model: nn.Module, ids_BT: Tensor) -> Way:
    """Greedy tokens with the key-value cache, the prompt's pass among them."""

    @torch.inference_mode()
    def run() -> None:
        token_BT, cache = ids_BT[:, :PROMPT_TOKENS], None
        for _ in range(NEW_TOKENS):
            output = model(input_ids=token_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token_BT, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values

    return Way(run, model.eval)


def kept_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """What a forward pass keeps for its backward pass, each memory once, without the parameters themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run().backward()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def print_memory(setting: Setting) -> None:
    """Bytes that a step keeps between forward and backward, and those of parameters, gradients and AdamW's moments."""
    table = Table("model", "kept for the backward pass, MB", "parameters that learn, M", "with gradients and AdamW's, MB")
    for name, model in setting.trained.items():
        model.train()
        parameters = list(learning(model).values())
        kept = kept_bytes(lambda model=model: loss_of(model, setting.ids_BT), model.parameters())  # type: ignore[misc]
        count = sum(parameter.numel() for parameter in parameters)
        # a parameter, its gradient and two moments, each of 4 bytes
        table.add_row(name, f"{kept / 1e6:.0f}", f"{count / 1e6:.1f}", f"{16 * count / 1e6:.0f}")
        for parameter in parameters:
            parameter.grad = None
    console.print(table)


def ways(setting: Setting, what: str) -> Mapping[str, Way]:
    """Every way by its label, the base first."""
    ids_BT = setting.ids_BT
    if what == "step":
        return {
            "base alone, forward and backward": base_way(setting.base, ids_BT),
            **{name: step_way(model, ids_BT) for name, model in setting.trained.items()},
        }
    # the balance loss is of training alone
    models = {"base alone": setting.base, **setting.trained}
    return {name: decode_way(model, ids_BT) for name, model in models.items() if model is not setting.balanced}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["step", "decode", "memory"])
    parser.add_argument("--experts", type=int, default=8, help="of each layer")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token")
    parser.add_argument("--rank", type=int, default=8, help="of each expert")
    parser.add_argument("--targets", choices=["qv", "all"], default="all", help="layers that get experts")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="of a row; decoding: a prompt of 32, then 32 new ones")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many")
    parser.add_argument("--seconds", type=float, default=240.0, help="no round that would end later")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cpu", action="store_true", help="count processor time, for one thread on a busy machine")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and the random experts")


def main(options: argparse.Namespace) -> None:
    """Prints the gates, and the ratios if they are green; SystemExit where they are not."""
    torch.set_num_threads(options.threads)
    setting = Setting(options)
    require(gates(setting))
    console.print(f"peft {peft.__version__}, torch {torch.__version__}, {options.threads} thread(s)", highlight=False)
    shape = f"top {options.top_k} of {options.experts} experts of rank {options.rank}, {options.targets} layers"
    if options.what == "memory":
        console.print(f"{options.rows}x{options.tokens} tokens, {shape}, fp32", highlight=False)
        print_memory(setting)
        return
    work = (
        f"{options.rows}x{options.tokens} tokens" if options.what == "step" else f"{options.rows} rows, 32 tokens after 32"
    )
    lora = next(iter(setting.loras))
    compare(
        f"{options.what}, {work}, {shape}, fp32",
        ways(setting, options.what),
        rounds=options.rounds,
        seconds=options.seconds,
        cpu=options.cpu,
        tables={"time, LoRA = 1": (lora, False)},
    )
