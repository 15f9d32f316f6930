"""Heads: whole trained modules beside the factors (modules_to_save), found and named by PEFT's own rule.

PEFT trains a copy of every module whose path ends in a listed name, even within a word (`classifier` also means
`pre_classifier`), and stores the copy under the module's own path: `base_model.model.score.weight`. Copies are never tied:
an `lm_head` saved for a base that ties it to its embedding is a separate tensor, and the embedding stays.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extend.formats import entry, require_finite, words

PREFIX = "base_model.model."
# the names that PEFT itself adds to modules_to_save for a task; one of them in the model is enough
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_OF_ADAPTERS = words(
    "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector base_layer original_module modules_to_save "
    "token_adapter trainable_tokens_delta"
)


def take_heads(
    stored: dict[str, Tensor], listed: Sequence[str], task: str, bias: str, folder: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Take the heads out of `stored`; return {parameter of the base model: tensor in fp32} and the heads' module names.

    `stored` is {key in the file: tensor}. `listed`, `task` and `bias` are the config's modules_to_save (a task adds its own
    head), task_type and bias; errors name `folder`. The file may have the module's own path, or PEFT's inner one
    (`score.modules_to_save.default.weight`). With `bias` "all" PEFT also writes the copy's bias a second time, and the bias
    of the base's module, which is dropped, as PEFT does not compute with it. Raises AdapterUnsupported for any other tensor
    inside such a module, AdapterCorrupt for a parameter with two values and for modules without tensors or empty ones.
    """
    names = list(dict.fromkeys((*listed, *TASK_HEADS.get(task, ()))))
    heads: dict[str, Tensor] = {}
    for key in list(stored) if names else ():
        pieces = re.sub(f"^({re.escape(PREFIX)})+", "", key).split(".")
        depth = _depth(pieces, names)
        if depth is None:
            continue
        tensor = stored.pop(key).float()
        if bias == "all" and pieces[depth] == "original_module" and pieces[-1] == "bias":
            continue
        parameter = ".".join(pieces[:depth] + _own_path(key, pieces, depth, folder))
        if (other := heads.setdefault(parameter, tensor)) is not tensor and not torch.equal(other, tensor):
            raise AdapterCorrupt(f"{folder}: several tensors are the head {parameter!r}, one is {key!r}")
    for parameter, tensor in heads.items():
        if not tensor.numel():
            raise AdapterCorrupt(f"{folder}: head {parameter!r} has shape {tuple(tensor.shape)} and holds nothing")
        require_finite(tensor, str(folder), f"head {parameter!r}")
    head_modules = [name for name in names if any(_depth(parameter.split("."), [name]) for parameter in heads)]
    optional = TASK_HEADS.get(task, ()) if head_modules else ()
    missing = [name for name in listed if name not in head_modules and name not in optional]
    if missing:
        raise AdapterCorrupt(
            f"{folder}: modules_to_save lists {missing[0]!r}, but the file has no tensor of such a module; PEFT could not "
            "load it either, so take the name out if the base model has no such module, or save the adapter again"
        )
    return heads, head_modules


def saved_modules(heads: Mapping[str, Tensor], layers: Iterable[str], recorded: object) -> tuple[list[str], str | None]:
    """Return (modules_to_save, task_type or None) under which PEFT loads exactly these heads, {parameter: tensor}.

    `layers` are the layers with an update. The names and the task in `recorded`, the config that the adapter was read with,
    are kept if they fit. A task for which PEFT expects a head is left out if there is none, since PEFT could not load the
    folder. Raises AdapterUnsupported if no names fit.
    """
    task = entry(recorded, "task_type", str)
    of_task = [name for name in TASK_HEADS.get(task or "", ()) if any(_depth(head.split("."), [name]) for head in heads)]
    if task in TASK_HEADS and not of_task:
        task = None
    # PEFT runs the names as regular expressions when it looks for target modules
    listed = entry(recorded, "modules_to_save", (list, tuple)) or ()
    plain = [name for name in listed if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)]
    known = list(dict.fromkeys([*plain, *of_task]))
    names = [name for name in known if any(_depth(head.split("."), [name]) for head in heads)]
    names += sorted({head.rpartition(".")[0] for head in heads if _depth(head.split("."), known) is None})
    in_effect = [*names, *TASK_HEADS.get(task or "", ())]
    for head in heads:
        _check_name(head, in_effect)
    for layer in layers if heads else ():
        if _depth([*layer.split("."), "weight"], in_effect) is not None:
            raise AdapterUnsupported(
                f"layer {layer!r} has an update, but PEFT would take it for a part of the trained heads "
                f"{', '.join(map(repr, names))} (it compares the ends of names), so no PEFT folder can hold both"
            )
    return names, task


def _check_name(head: str, names: Sequence[str]) -> None:
    pieces = head.split(".")
    depth = _depth(pieces, names) if all(pieces) else None
    if depth is None or set(pieces) & _OF_ADAPTERS or head.startswith(PREFIX):
        raise AdapterUnsupported(
            f"head {head!r} is not a parameter of a module, named as PEFT needs it (module path, then parameter)"
        )


def _depth(pieces: Sequence[str], names: Sequence[str]) -> int | None:
    """Return how many pieces of a parameter's path lead to the outermost module that PEFT saves for `names`, or None."""
    ends = tuple(names)
    return next((depth for depth in range(1, len(pieces)) if ".".join(pieces[:depth]).endswith(ends)), None)


def _own_path(key: str, pieces: list[str], depth: int, folder: Path) -> list[str]:
    """Return the pieces after the saved module's path, `pieces[:depth]`, without PEFT's own (modules_to_save, default)."""
    rest = pieces[depth:]
    if rest[0] == "modules_to_save":
        rest = rest[1:]
        if len(rest) > 1:
            # any other word may be an adapter's name or a module's
            rest = rest[1:] if rest[0] == "default" else []
    if not rest or not all(rest) or (set(pieces[:depth]) | set(rest)) & _OF_ADAPTERS:
        raise AdapterUnsupported(
            f"{folder}: tensor {key!r} lies in a module of modules_to_save and is not one of its parameters, so its "
            "meaning is unknown; save the adapter again with PEFT"
        )
    return rest
