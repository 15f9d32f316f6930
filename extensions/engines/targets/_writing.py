"""The parts that targets share: refusals of unsupported adapters, atomic writing of folders, and fused experts.

Fused experts are written for programs that have gate, up and down of all experts as one tensor each.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave import AdapterUnsupported, Factors
from loraweave.extend import algebra, replacing, require_replaceable
from loraweave.extend.formats import Contents, readme_text
from loraweave.extend.training import save_tensors
from loraweave.extensions.engines.export import TIED_MODULES

README = "README.md"

_KINDS = {
    "conv": "a convolution",
    "embedding": "an embedding",
    "linear": "a linear layer",
    "expert": "an expert of a fused parameter",
}


def require_plain(contents: Contents, name: str, program: str, *, kinds: tuple[str, ...] = ("linear",)) -> None:
    """Raise AdapterUnsupported for anything but low-rank factors of layers of these kinds that act on every token."""
    if contents.invocation:
        raise AdapterUnsupported(
            f"adapter {name!r} acts only from its invocation tokens {list(contents.invocation)} on. {program}'s files "
            "have no place for them, and it would act on every token: target='peft' and `loraweave serve` keep them; "
            "dataclasses.replace(adapter, invocation=()) is the plain LoRA, another model"
        )
    if contents.heads:
        raise AdapterUnsupported(
            f"{program} loads no trained heads, but adapter {name!r} has {', '.join(sorted(contents.heads))}: merge it into "
            "the base with peft and serve that model, or export dataclasses.replace(adapter, heads={}) without them"
        )
    for layer, factors in contents.layers.items():
        where = f"layer {layer!r} of adapter {name!r}"
        if factors.magnitude_O is not None or factors.gain_O is not None:
            what = "is DoRA" if factors.magnitude_O is not None else "has a gain (bound DoRA, or (IA)3)"
            raise AdapterUnsupported(
                f"{where} {what}, which {program} does not load: lw.to_lora(adapter, model) gives a plain LoRA of it"
            )
        if factors.base_bias_O is not None or (factors.bias_O is not None and bool(factors.bias_O.any())):
            raise AdapterUnsupported(
                f"{where} has a trained bias, which {program} does not load: merge the adapter into the base with peft and "
                "serve that model, or leave the biases out of its layers with dataclasses.replace"
            )
        if factors.kind not in kinds:
            raise AdapterUnsupported(
                f"{where} is {_KINDS[factors.kind]}, which {program} has no LoRA for: merge the adapter into the base with "
                "peft and serve that model"
            )


def require_untied(contents: Contents, name: str, program: str, config: Any) -> None:
    """Raise AdapterUnsupported for an update of the embedding or the head if `config`, the base's, ties the two."""
    if not getattr(config, "tie_word_embeddings", False):
        return
    for layer in contents.layers:
        if layer.rpartition(".")[2] in TIED_MODULES:
            raise AdapterUnsupported(
                f"layer {layer!r} of adapter {name!r} is one side of embeddings that the base model ties, and {program} has "
                "one matrix for both: train without that layer, or merge the adapter into the base with peft and serve that "
                "model"
            )


def stored_factors(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return (a, b) as programs store them: (R, I) and (O, R), with the axes of the kernel size for a convolution."""
    a_RI, b_OR = factors.a_RI.contiguous(), factors.b_OR.contiguous()
    if factors.kind != "conv":
        return a_RI, b_OR
    return a_RI.reshape(a_RI.shape[0], -1, *factors.kernel), b_OR.reshape(*b_OR.shape, *(1 for _ in factors.kernel))


def place(contents: Contents, folder: Path, library: str, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write a folder all at once: `files`, {name: function that writes to a path}, a README and the adapter's own files.

    `library` is the README's entry for the program. Raises AdapterUnsupported for an adapter without effect or values that
    are not finite; AdapterExists for a folder with anything else in it.
    """
    contents.require_effect(str(folder))
    for layer, factors in contents.layers.items():
        for part, tensor in factors.tensors().items():
            if not algebra.all_finite(tensor):
                raise AdapterUnsupported(f"layer {layer!r}: {part} has values that are NaN or infinite")
    written = {*files, README, *contents.files}
    target = require_replaceable(folder, lambda path: path.name in written and not path.is_dir())
    ranks = {factors.rank for factors in contents.layers.values()}
    facts = {"Layers": str(len(contents.layers)), "Rank": str(max(ranks)), "Files": ", ".join(files)}
    with replacing(target) as new:
        for file, write in files.items():
            write(new / file)
            (new / file).chmod(0o644)
        (new / README).write_text(readme_text(contents.base_model, contents.card, facts, library), encoding="utf-8")
        for file, data in contents.files.items():
            (new / file).write_bytes(data)


def tensors_file(tensors: Mapping[str, Tensor]) -> Callable[[Path], object]:
    """Return the function that writes these tensors to a path, as a safetensors file in fp32."""
    return lambda path: save_tensors(
        {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def num_experts(config: Any) -> int:
    """Return the number of experts in each layer of a base with this config, 0 if it has none."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


def matrices(parameter: str) -> list[str]:
    """Return the paths of the program's matrices for a fused parameter of experts, in the order of its outputs."""
    place, _, last = parameter.rpartition(".")
    return [f"{place}.gate_proj", f"{place}.up_proj"] if last == "gate_up_proj" else [parameter]


def require_known(layer: str, config: Any, name: str) -> None:
    """Raise AdapterUnsupported if the base of this config lacks the expert that `layer` ends in; `name` is the adapter's."""
    parameter, _, number = layer.rpartition(".")
    if not number.isdigit() or int(number) >= num_experts(config):
        raise AdapterUnsupported(
            f"adapter {name!r} updates expert {number} of {parameter!r}, and the base model has {num_experts(config)} "
            "experts: was the adapter made for another base model?"
        )


def stacked(contents: Contents, config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {path of a matrix: (a_ERI, b_EOR)}, zeros for an expert without an update; gate and up share one a."""
    parameters: dict[str, dict[int, Factors]] = {}
    for layer, factors in contents.layers.items():
        if factors.kind == "expert":
            parameter, _, number = layer.rpartition(".")
            parameters.setdefault(parameter, {})[int(number)] = factors
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for parameter, updates in parameters.items():
        first = next(iter(updates.values()))
        none = Factors(torch.zeros_like(first.a_RI), torch.zeros_like(first.b_OR))
        all_updates = [updates.get(number, none) for number in range(num_experts(config))]
        paths, a_ERI = matrices(parameter), torch.stack([part.a_RI for part in all_updates])
        parts = torch.stack([part.b_OR for part in all_updates]).chunk(len(paths), dim=1)
        tensors |= {path: (a_ERI, b_EOR) for path, b_EOR in zip(paths, parts, strict=True)}
    return tensors
