"""Writes `data/`: one of everything that loraweave saves, with what it answered then. test_saved.py opens them.

The files are those of version 0.1.0 before its modules moved. `python tests/saved/make.py FOLDER` writes such a folder with
the code at hand; a new one goes beside the old one, which stays (`checkpoints/experts-2` has
mola's loss as it is since).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import loraweave as lw

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [4, 4, 7, 8, 3]])
EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]
ROWS = {"first": EXAMPLES, "second": [(target, text) for text, target in EXAMPLES]}
TRAINING = {"steps": 6, "progress": False, "seed": 3}
JOBS = {**TRAINING, "rank": 2, "jobs_per_batch": 1}
FIT = {**TRAINING, "checkpoint_every": 2}
SEARCH = {"method": "lorahub", "budget": 12, "folds": 2, "progress": False}
EXPERTS = {"num_experts": (2, 3), "rank": 2, "target_modules": ("q_proj", "down_proj")}
# what a router cannot do without, besides the pool
ROUTERS: dict[str, dict[str, Any]] = {
    "arrow": {},
    "phatgoose": {},
    "xlora": {},
    "lora_flow": {},
    "mixture_of_adapters": {},
    "similarity": {"embedder": "hashing"},
    "logistic": {"embedder": "hashing"},
}
# those whose answers are kept, too
ANSWERING = ("arrow", "phatgoose", "xlora", "lora_flow")
RECIPES: dict[str, dict[str, Any]] = {
    "mola": EXPERTS,
    "mixtral": {"rank": 2},
    "hydralora": {"rank": 2},
    "mocle": {"rank": 2, "by_task": True, "tasks": ("sums", "colours")},
}


class Stopped(BaseException):
    """A process that ends in the middle of a training."""


@contextmanager
def stopped_after(model: nn.Module, calls: int) -> Iterator[None]:
    """The model runs so many times, and then never again."""
    left = calls

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped

    hook = model.register_forward_pre_hook(count)
    try:
        yield
    except Stopped:
        pass
    finally:
        hook.remove()


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Gives a function that tells how often the model has run."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        hook.remove()


def changed(module: nn.Module | dict[str, torch.Tensor]) -> None:
    """Values that differ from those at the beginning."""
    generator = torch.Generator().manual_seed(5)
    values = list(module.parameters()) if isinstance(module, nn.Module) else list(module.values())
    with torch.no_grad():
        for value in values:
            value.add_(0.5 * torch.randn(value.shape, generator=generator, dtype=value.dtype))


def router(name: str, pool: lw.ExpertPool) -> Any:
    torch.manual_seed(7)
    made = lw.router(name, pool, **ROUTERS[name])
    changed(made)
    return made


@contextmanager
def in_float64(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of a Llama whose norms and rotary tables are in float64 too; transformers has them in float32 in any dtype."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def tables(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.arange(len(self.inv_freq), dtype=x.dtype) / len(self.inv_freq)
        angles = (position_ids[..., None] * self.config.rope_parameters["rope_theta"] ** -steps).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    with patch.object(LlamaRMSNorm, "forward", norm), patch.object(LlamaRotaryEmbedding, "forward", tables):
        yield copy.deepcopy(model).double()


@torch.no_grad()
def answered(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS_BT).logits.contiguous()


def task() -> lw.Task:
    return lw.Task(EXAMPLES, instruction="swap")


def trainings(model: nn.Module, tokenizer: Any, pool: lw.ExpertPool) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Each kind of training or search that can be resumed, as a function of its checkpoint folder (None: from the start)."""

    def adapters(folder: Path | None) -> dict[str, Any]:
        made = lw.train_adapters(model, tokenizer, ROWS, checkpoint=folder, **JOBS)
        return {f"{name}.{layer}": adapter.delta(layer) for name, adapter in made.items() for layer in adapter.layers}

    def a_router(folder: Path | None) -> dict[str, Any]:
        torch.manual_seed(7)
        made = lw.router("phatgoose", pool)
        with_tokenizer = lw.Composer(model, pool, tokenizer=tokenizer)
        data = {"a": ROWS["first"], "b": ROWS["second"]}
        made.fit(with_tokenizer, data, checkpoint=folder, batch_size=2, **FIT)
        with_tokenizer.close()
        return dict(made.state_dict())

    def experts(folder: Path | None) -> dict[str, Any]:
        with lw.experts("mola", model, **EXPERTS) as made:
            made.fit(EXAMPLES, checkpoint=folder, tokenizer=tokenizer, batch_size=2, **FIT)
            return {name: value.detach().clone() for name, value in made.expert_parameters().items()}

    def search(folder: Path | None) -> dict[str, Any]:
        found = lw.compose(model, tokenizer, pool, task(), checkpoint=folder, **SEARCH)
        return {name: torch.tensor(weight) for name, weight in found.weights.items()}

    return {"adapters": adapters, "router": a_router, "experts": experts, "search": search}


def make(folder: Path, model: nn.Module, tokenizer: Any, adapters: list[lw.Adapter]) -> None:
    """Writes one of everything below `folder`, with expected.safetensors and expected.json."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    fingerprint = lw.base_key(model).fingerprint
    texts = [["f j l", "c e"], ["h i d", "h h"], ["e e e", "f e"]]
    own = [
        replace(adapter, base_model="tiny", fingerprint=fingerprint, card={"examples": examples})
        for adapter, examples in zip(adapters, texts, strict=True)
    ]
    pool = lw.ExpertPool(own)
    for adapter in own:
        adapter.save_pretrained(folder / "adapters" / adapter.name)
    merged = lw.merge(own, [0.7, -0.4, 1.0], method="ties", rank=2, name="merged")
    merged.save_pretrained(folder / "adapters" / "merged")
    with lw.Hub(folder / "hub") as hub:
        for adapter in own:
            hub.add(adapter, description=f"says {adapter.name}", tags=["letter"], license="Apache-2.0")
        hub.add(replace(merged, name="a"), description="another a", replace=True)
        hub.update("b", tags=["letter", "second"])
        hashes = {record.name: record.hash for record in hub}
    expected = {}
    for name in ROUTERS:
        made = router(name, pool)
        made.save_pretrained(folder / "routers" / name, pool=pool if name == "arrow" else None)
        for key, value in made.state_dict().items():
            expected[f"routers.{name}.{key}"] = value.contiguous().clone()
    for name, options in RECIPES.items():
        with lw.experts(name, model, **options) as made:
            changed(made.expert_parameters())
            made.save_pretrained(folder / "experts" / name)
    found = {}
    for method, options in {
        "lorahub": SEARCH,
        "gradient": {**SEARCH, "method": "gradient", "folds": 0},
        "arrow": {**SEARCH, "method": "arrow"},
    }.items():
        found[method] = lw.compose(model, tokenizer, pool, task(), **options)
        found[method].save_pretrained(folder / "compositions" / method)
    with in_float64(model) as exact:
        activated = {
            "mixture": {"a": 0.5, "c": -1.0},
            **{f"answers.{name}": router(name, pool) for name in ANSWERING},
            **{f"compositions.{method}": composed.weights for method, composed in found.items()},
        }
        expected["base"] = answered(exact)
        for key, weights in activated.items():
            with lw.Composer(exact, pool, tokenizer=tokenizer).activate(weights):
                expected[key] = answered(exact)
        for name in RECIPES:
            with torch.no_grad(), lw.experts(folder / "experts" / name, exact) as made:
                told = {"task": ["sums", "colours"]} if made.recipe.needs_tasks else {}
                expected[f"experts.{name}"] = made(input_ids=IDS_BT, **told).logits.contiguous()
    for name, train in trainings(model, tokenizer, pool).items():
        kept = folder / "checkpoints" / name
        with counted(model) as runs:
            train(None)
            whole = runs()
        with stopped_after(model, whole * 2 // 3):
            train(kept)
        assert any(kept.rglob("*")), name
    save_file(expected, folder / "expected.safetensors")
    chosen = {method: composed.report.chosen for method, composed in found.items()}
    note = {"version": lw.__version__, "hashes": hashes, "compositions": chosen}
    (folder / "expected.json").write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    import runpy

    tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py"))
    base = tiny["make_model"].__wrapped__()("llama")
    make_adapter = tiny["make_adapter"].__wrapped__()
    words = tiny["tokenizer"].__wrapped__()
    make(Path(sys.argv[1]), base, words, tiny["make_adapters"].__wrapped__(make_adapter)(base, "llama"))
