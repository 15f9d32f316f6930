"""Polytropon in PEFT's form (Ponti et al. 2022, arXiv 2202.13914): skills mixed factor by factor, by each task's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import torch

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend.formats import AdapterConfig, words
from loraweave.extensions.adapter_types.formats._foreign import ForeignFormat, StoredLayer, plain_factors

# as in PEFT
EPS = 1e-12
MAX_TASKS = 10_000


class Poly(ForeignFormat):
    """One task's adapter, exactly of rank r: in each split of the features, a = sum of w_s a_s, b = sum of w_s b_s / r.

    s are skills, w_s = sigmoid(z_s) / sum of the sigmoids, z the task's logits. A folder of several tasks has an adapter
    for each: the path `<folder>/task_N` means one, and `lw.router(folder).pool` has all.
    """

    peft_type = "POLY"
    parts = frozenset({"poly_lora_A", "poly_lora_B", "poly_router.module_logits"})
    fields = words("r n_tasks poly_type n_skills n_splits init_weights")
    # the number of the task; None for the only one
    task: ClassVar[int | None] = None

    @classmethod
    def part(cls, name: str) -> type[Poly] | None:
        """Return the reader of the adapter called `task_N`, or None for another name."""
        match = re.fullmatch(r"task_(0|[1-9]\d{0,8})", name)
        return type(cls.__name__, (cls,), {"task": int(match[1])}) if match else None

    @classmethod
    def part_names(cls, folder: Path) -> list[str]:
        """Return the names of a folder's tasks, "task_0" and so on."""
        # the config of the first task, since a folder of several is no adapter itself
        first: type[Poly] = type(cls.__name__, (cls,), {"task": 0})
        config = first._config(folder)
        return [f"task_{number}" for number in range(config.count("n_tasks", 1, most=MAX_TASKS))]

    @classmethod
    def _config(cls, folder: Path) -> AdapterConfig:
        config = super()._config(folder)
        count = config.count("n_tasks", 1)
        if count > 1 if cls.task is None else cls.task >= count:
            raise AdapterUnsupported(
                f"{folder}: this POLY has {count} tasks, each an adapter of its own: give the path of one, "
                f"{str(folder / 'task_0')!r} to {str(folder / f'task_{count - 1}')!r}; lw.router(folder).pool has all"
            )
        return config

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        layer.choice("poly_type", ["poly"], "poly")
        a_QSDR = layer.part("poly_lora_A", None, None, None, None)
        num_splits, num_skills, _, rank = a_QSDR.shape
        b_QSRD = layer.part("poly_lora_B", num_splits, num_skills, rank, None)
        logits_TP = layer.part("poly_router.module_logits", layer.config.count("n_tasks", 1), num_splits * num_skills)
        if layer.config.count("r") != rank:
            raise AdapterCorrupt(f"{layer.where} has rank {rank} in the file and r={layer.config.fields['r']} in the config")
        w_QS = logits_TP[cls.task or 0].view(num_splits, num_skills).sigmoid()
        w_QS = w_QS / (w_QS.sum(dim=1, keepdim=True) + EPS)
        a_RI = torch.einsum("qs,qsdr->rqd", w_QS, a_QSDR).flatten(1)
        b_OR = torch.einsum("qs,qsrd->qdr", w_QS, b_QSRD).flatten(0, 1)
        return plain_factors(a_RI, b_OR / rank)
