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

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import peft
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

import loraweave as lw
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
from loraweave.composer.experts.expert_model import ExpertModel

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
        shared: dict[str, Any] = {
            "num_experts": (experts,),
            "top_k": top_k,
            "rank": rank,
            "target_modules": endings,
            "seed": seed,
        }
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


class Loop(nn.Module):
    """The published formula one expert after the other: the tokens that chose it are taken out, and their updates added."""

    def __init__(self, base: nn.Linear, a_ERI: Tensor, b_ERO: Tensor, r_EI: Tensor, scale: float, top_k: int) -> None:
        super().__init__()
        self.base, self.scale, self.top_k = base, scale, top_k
        self.a = nn.ParameterList([nn.Parameter(a_RI) for a_RI in a_ERI])
        self.b = nn.ParameterList([nn.Parameter(b_RO) for b_RO in b_ERO])
        self.r_EI = nn.Parameter(r_EI)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_NO = self.base(x_BTI).flatten(0, 1)
        x_NI = x_BTI.flatten(0, 1)
        p_NE = functional.linear(x_NI, self.r_EI).softmax(dim=1)
        best_NK, chosen_NK = p_NE.topk(self.top_k, dim=1)
        w_NK = best_NK / best_NK.sum(dim=1, keepdim=True)
        for expert, (a_RI, b_RO) in enumerate(zip(self.a, self.b, strict=True)):
            token_Z, choice_Z = torch.where(chosen_NK == expert)
            update_ZO = (x_NI[token_Z] @ a_RI.T) @ b_RO * self.scale
            y_NO = y_NO.index_add(0, token_Z, update_ZO * w_NK[token_Z, choice_Z, None])
        return y_NO.view(*x_BTI.shape[:2], -1)


Layer = Callable[[nn.Linear, Tensor, Tensor, Tensor, float, int], nn.Module]


def in_layers(made: ExpertModel, layer: Layer) -> nn.Module:
    """A model with copies of the experts and gates of ours, at equal ranks, in layers of another kind."""
    model = sharing(made.base_model)
    for name, factors, gate in experts_of(made):
        parent, _, child = name.rpartition(".")
        num_experts = factors.shape.num_experts
        a_ERI, b_ERO = (part.detach().unflatten(0, (num_experts, -1)).clone() for part in (factors.a_SI, factors.b_SO))
        base: Any = model.get_submodule(name)
        made_of = layer(base, a_ERI, b_ERO, gate.r_EI.detach().clone(), factors.scale, gate.top_k)
        setattr(model.get_submodule(parent), child, made_of)
    return model


def experts_of(made: ExpertModel) -> Iterator[tuple[str, Any, Any]]:
    """Path, factors and gate of each site."""
    for name in made.sites:
        key = name.replace(".", "/")
        yield name, made.layers[key], made.gates[key]


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model with the very same parameters."""
    memo = {id(value): value for value in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


def lora_in_peft(model: nn.Module, rank: int, endings: tuple[str, ...], seed: int) -> nn.Module:
    """One LoRA of that rank in peft, trainable, with values other than those at its beginning."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(endings), task_type="CAUSAL_LM")
    found = peft.get_peft_model(sharing(model), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return found


def mergoo_layer() -> Layer | None:
    """mergoo's `LoRAMoeLayer`; None where the package is not installed (`pip install --no-deps mergoo`).

    Its gate has the model's hidden size as inputs, which a layer with others could not use: here it has the layer's own.
    """
    try:
        from mergoo.compose_layers import LoRAMoeLayer
    except ImportError:
        return None

    def layer(base: nn.Linear, a_ERI: Tensor, b_ERO: Tensor, r_EI: Tensor, scale: float, top_k: int) -> nn.Module:
        num_experts, rank = a_ERI.shape[:2]
        settings = {"r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "init_lora_weights": True}
        config = SimpleNamespace(
            num_experts_per_tok=top_k,
            num_experts=num_experts,
            hidden_size=base.in_features,
            adapter_configs=[{**settings, "use_rslora": False, "use_dora": False}] * num_experts,
        )
        made: Any = LoRAMoeLayer(config, base.in_features, base.out_features, bias=base.bias is not None)
        made.base_layer, made.gate.weight = base, nn.Parameter(r_EI)
        for expert in range(num_experts):
            made.lora_A[str(expert)].weight = nn.Parameter(a_ERI[expert])
            made.lora_B[str(expert)].weight = nn.Parameter(b_ERO[expert].T.contiguous())
        return made

    return layer


def moe_peft_layer() -> Layer | None:
    """MoE-PEFT's `MolaSparseMoe`; None where it, or `datasets`, is not installed (`pip install --no-deps moe_peft`).

    Its own dropout, which it wants above 0, is switched off.
    """
    try:
        from moe_peft.adapters.mola.config import MolaConfig
        from moe_peft.adapters.mola.model import MolaSparseMoe
        from moe_peft.common import Linear, LoraConfig
    except ImportError:
        return None

    class Both(nn.Module):
        """The base layer, and the experts that it is given with."""

        def __init__(self, linear: Any, experts: Any) -> None:
            super().__init__()
            # which are no modules there, so that torch would not find their parameters
            self.experts = experts
            self.base, self.gate, self.factors = linear.base_layer_, experts.gate_, nn.ModuleList(linear.loras_.values())
            self.linear = [linear]

        def forward(self, x_BTI: Tensor) -> Tensor:
            made: Tensor = self.experts.forward(self.base(x_BTI), x_BTI, lora_linear=self.linear[0])
            return made

    def layer(base: nn.Linear, a_ERI: Tensor, b_ERO: Tensor, r_EI: Tensor, scale: float, top_k: int) -> nn.Module:
        num_experts, rank = a_ERI.shape[:2]
        shared = {
            "lora_r_": rank,
            "lora_alpha_": scale * rank,
            "lora_dropout_": 0.5,
            "use_dora_": False,
            "use_rslora_": False,
        }
        linear = Linear(base, "cpu")
        for expert in range(num_experts):
            name = f"moe.own.experts.{expert}"
            config = LoraConfig(adapter_name=name, lora_init_="original", target_modules_={}, **shared)
            linear.init_lora_weight(config, (a_ERI[expert], b_ERO[expert].T.contiguous()))
            linear.loras_[name].dropout_.p = 0.0
        gate = MolaConfig(adapter_name="own", num_experts_=num_experts, top_k_=top_k, router_init_range_=5.0)
        return Both(linear, MolaSparseMoe(base.in_features, torch.device("cpu"), gate, gate=r_EI))

    return layer
