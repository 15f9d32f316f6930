"""The fingerprint of a base model: which parameters it has, and a few hundred of its weights."""

from __future__ import annotations

import hashlib

import torch

from loraweave.types import Fingerprint

NUM_TENSORS = 16
SAMPLES_PER_TENSOR = 16


def fingerprint(model: torch.nn.Module) -> Fingerprint:
    """Names and shapes of all parameters, hashed, and 256 weights at fixed places of the largest matrices' rows.

    Buffers, dtype and device do not enter. A parameter on the meta device or of an integer dtype gives no samples.
    """
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:32]
    matrices = sorted((name, p) for name, p in model.named_parameters() if p.dim() >= 2)
    if any(p.is_meta or not p.is_floating_point() for _, p in matrices) or not matrices:
        return Fingerprint(digest)
    step = max(1, len(matrices) // NUM_TENSORS)
    samples: list[float] = []
    for _, parameter in matrices[::step][:NUM_TENSORS]:
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, flat.shape[0] - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()
        # rounded to bf16 and back, so that a checkpoint loaded in fp32 and in bf16 gives the same figures
        samples.extend(flat[places.to(flat.device)].to(torch.bfloat16).float().tolist())
    return Fingerprint(digest, tuple(samples))
