"""What trainable mixtures of LoRA experts cost, beside one LoRA in peft and the same experts elsewhere.

    python -m benchmarks expert_costs step            a training step of 8 rows of 64 tokens, top 2 of 8 experts of rank 8
    python -m benchmarks expert_costs decode          32 greedy tokens with KV cache after a prompt of 32
    python -m benchmarks expert_costs memory          bytes that a step keeps between forward and backward

Time relative to one LoRA in peft of the rank that is active for a token. Beside it: the base alone, one LoRA of as many
parameters, and the same experts and gates as the published code computes them (a loop over experts with masks), in mergoo's
layer and in MoE-PEFT's, where these are installed (`pip install --no-deps mergoo moe_peft`, and datasets). All models share
their base's weights. Logits and gradients are compared first, and nothing is reported where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import peft
import torch
import typer
from torch import Tensor, nn

import loraweave as lw
from benchmarks._expert_peers import Loop, experts_of, in_layers, lora_in_peft, mergoo_layer, moe_peft_layer, sharing
from benchmarks._models import (
    ALL,
    ATTENTION,
    LIMIT,
    base_model,
    changes,
    difference,
    generate,
    gradient_norm,
    learning,
    tokens,
)
from benchmarks._run import Run, Table, console
from benchmarks._timing import Gate, Way, compare, require

LR = 1e-4
CLIP = 1.0
PROMPT_TOKENS = 32
NEW_TOKENS = 32

app = typer.Typer()


class Setting:
    """One base with our experts, and models that share its weights with the same experts, or a LoRA of the same size.

    Experts are live only in calls of our model, so that the base itself is a way too. `plain` has no balance loss, which
    the others have not either.
    """

    def __init__(self, rows: int, length: int, *, experts: int, top_k: int, rank: int, targets: str, seed: int) -> None:
        model, _ = base_model()
        self.base = sharing(model)
        endings = ALL if targets == "all" else ATTENTION
        shared = {"num_experts": (experts,), "top_k": top_k, "rank": rank, "target_modules": endings, "seed": seed}
        self.plain = lw.experts("mola", model, balance=0.0, **shared)
        randomise(self.plain, seed)
        self.balanced = lw.experts("mola", sharing(model), **shared)
        self.balanced.load_state_dict(self.plain.expert_state(), strict=False)
        kinds = {
            "a loop over experts with masks": Loop,
            "mergoo's layer": mergoo_layer(),
            "MoE-PEFT's layer": moe_peft_layer(),
        }
        self.elsewhere = {name: in_layers(self.plain, kind) for name, kind in kinds.items() if kind is not None}
        self.loras = {
            f"peft, one LoRA of rank {rows_of}, {what}": lora_in_peft(model, rows_of, endings, seed)
            for rows_of, what in ((top_k * rank, "as active"), (experts * rank, "as many parameters"))
        }
        self.ids_BT = tokens(model, rows, length, seed)

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


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    return loss


def gates(setting: Setting) -> list[Gate]:
    """Logits and gradients of our experts against the same ones in every other library's layers."""
    ids_BT, found, own = setting.ids_BT[:2], [], setting.plain.eval()
    logits, base = (model(input_ids=ids_BT).logits.detach() for model in (own, setting.base))
    norm = norm_of(own, ids_BT)
    for name, model in setting.elsewhere.items():
        theirs = model(input_ids=ids_BT).logits.detach()
        found.append(Gate(f"logits equal those with {name}", difference(theirs, logits), LIMIT))
        found.append(Gate("and so does the norm of the gradients", difference(norm_of(model, ids_BT), norm), LIMIT))
    return [*found, changes("experts", difference(logits, base))]


def norm_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Of the gradients of all parameters that learn, which have none afterwards."""
    loss_of(model, ids_BT).backward()
    norm = gradient_norm(learning(model))
    model.zero_grad()
    return norm


def step_way(model: nn.Module, ids_BT: Tensor) -> Way:
    """Forward, backward, clipping and AdamW."""
    parameters = learning(model)
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


def memory(setting: Setting, title: str) -> Table:
    """Bytes that a step keeps between forward and backward, and those of parameters, gradients and AdamW's moments."""
    columns = ("kept for the backward pass, MB", "parameters that learn, M", "with gradients and AdamW's, MB")
    table = Table(title, ("model", *columns))
    for name, model in setting.trained.items():
        model.train()
        kept = kept_bytes(lambda model=model: loss_of(model, setting.ids_BT), model.parameters())  # type: ignore[misc]
        count = sum(parameter.numel() for parameter in learning(model))
        # a parameter, its gradient and two moments, each of 4 bytes
        table.add(name, f"{kept / 1e6:.0f}", f"{count / 1e6:.1f}", f"{16 * count / 1e6:.0f}")
        model.zero_grad()
    return table


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
    return {
        name: Way(generate(model, ids_BT[:, :PROMPT_TOKENS], NEW_TOKENS), model.eval)
        for name, model in models.items()
        if model is not setting.balanced
    }


@app.command()
def main(
    context: typer.Context,
    what: Annotated[Literal["step", "decode", "memory"], typer.Argument()],
    experts: Annotated[int, typer.Option(help="of each layer")] = 8,
    top_k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    rank: Annotated[int, typer.Option(help="of each expert")] = 8,
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers that get experts")] = "all",
    rows: Annotated[int, typer.Option(help="of a batch")] = 8,
    length: Annotated[int, typer.Option("--tokens", help="of a row; decoding: a prompt of 32, then 32 new ones")] = 64,
) -> None:
    """Prints the gates, and the ratios if they are green."""
    run: Run = context.obj
    setting = Setting(rows, length, experts=experts, top_k=top_k, rank=rank, targets=targets, seed=run.seed)
    require(gates(setting))
    console.print(f"peft {peft.__version__}, torch {torch.__version__}")
    work = f"{rows} rows, {NEW_TOKENS} tokens after {PROMPT_TOKENS}" if what == "decode" else f"{rows}x{length} tokens"
    title = f"{what}, {work}, top {top_k} of {experts} experts of rank {rank}, {targets} layers, fp32"
    if what == "memory":
        run.show(memory(setting, title))
        return
    tables = {"time, LoRA = 1": (next(iter(setting.loras)), False)}
    compare(run, title, ways(setting, what), tables, seconds=240.0)
