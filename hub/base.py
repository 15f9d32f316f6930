"""Base models: a model-hub id, a local folder, a GGUF file, or the embedded default that comes from PyPI."""

from __future__ import annotations

import copy
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import loraweave.registry as registry
from loraweave.common.names import text_digest
from loraweave.common.options import options_of, require_known
from loraweave.errors import BaseModelMismatch, BaseModelUnverified, CompositionError, PackageMissing, WeightingError
from loraweave.hub.gguf_base import EMBEDDED, gguf_base, without_bars
from loraweave.types import BaseKey, Fingerprint


def load_base(
    name: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **unknown: Any,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a base model, in evaluation mode.

    `name`: None for $LORAWEAVE_BASE, if it is set, else for the embedded default; or a local folder, a GGUF file, a
    model-hub id, or a name of the registry `bases`. `dtype`: a torch.dtype or its name, as "bfloat16"; None means fp32 for a
    GGUF file (as the default), else the checkpoint's own. Adapters record the model's `name_or_path`.

    `device` puts all of it in one place, `device_map` spreads it ("auto", or {module: device}). `quantization_config`,
    `attn_implementation` and `revision` (branch, tag or commit of a model-hub id; adapters are compared with its commit) are
    those of transformers. `trust_remote_code=True` runs Python files of the checkpoint with your rights: read them first.

    Raises PackageMissing if the embedded default, the quantisation or the attention needs a package that is not installed,
    AdapterCorrupt for a damaged cache or package file, WeightingError for an `unknown` argument, an unknown dtype and
    arguments that exclude each other, and BaseModelMismatch when nothing of that name can be loaded.
    """
    require_known("load_base()", unknown, options_of(load_base), noun="argument")
    if device is not None and device_map is not None:
        raise WeightingError(f"device={device!r} and device_map={device_map!r} both say where the model goes: give one")
    if not isinstance(trust_remote_code, bool):
        raise WeightingError(f"trust_remote_code={trust_remote_code!r} is not True: give True to consent, or leave it out")
    if revision is not None and (name is None or Path(name).is_dir()):
        what = "the embedded default comes from a package" if name is None else f"{str(name)!r} is a local folder"
        raise WeightingError(f"revision={revision!r} names a commit of a repository, but {what}: give the id of one")
    arguments = {
        "device_map": {"": device} if device is not None else device_map,
        "quantization_config": quantization_config,
        "attn_implementation": attn_implementation,
    }
    settings = {key: value for key, value in arguments.items() if value is not None}
    read_as = _torch_dtype(dtype)
    name = name or os.environ.get("LORAWEAVE_BASE") or None
    stored = None if revision is not None else gguf_base(name)
    if stored is not None:
        folder = stored.folder()
        settings |= {"dtype": read_as or torch.float32, "local_files_only": True}
        with without_bars():
            model = _named_errors(folder, lambda: AutoModelForCausalLM.from_pretrained(folder, **settings))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model.config.name_or_path = model.name_or_path = stored.id
    else:
        settings |= {"dtype": read_as or "auto", "use_safetensors": True}
        shared = {"trust_remote_code": trust_remote_code, "revision": revision}
        model, tokenizer = _named_errors(str(name), lambda: _load_named(str(name), settings, shared))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype | None):
        return dtype
    known: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
    if str(dtype).removeprefix("torch.") not in known:
        raise WeightingError(
            f"dtype={dtype!r} is not a dtype of weights{registry.nearest(str(dtype), known)}: give {', '.join(known)}, as a "
            "text or as torch's own, or leave it out"
        )
    return known[str(dtype).removeprefix("torch.")]


def fast_dtype() -> torch.dtype:
    """Return bf16 if a timing made now shows that this machine multiplies it faster than fp32, else fp32."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        torch.nn.functional.linear(x, weight)
        return timeit(lambda: torch.nn.functional.linear(x, weight), number=5)

    return min((torch.float32, torch.bfloat16), key=seconds)


def _load_named(name: str | Path, settings: Mapping[str, Any], shared: dict[str, Any]) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(name, **shared)
    if not Path(name).is_dir():
        # the rest comes from the commit that the config came from, which later versions of transformers do not record
        config_file = try_to_load_from_cache(str(name), "config.json", revision=shared["revision"])
        shared |= {"revision": Path(config_file).parent.name} if isinstance(config_file, str) else {}
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_pretrained(name, **settings, **shared)
    if not Path(name).is_dir():
        model.config._commit_hash = shared["revision"]
    return model, AutoTokenizer.from_pretrained(name, **shared)


def _named_errors(name: str | Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ImportError as error:
        raise PackageMissing(f"a package is missing to load {str(name)!r} as asked: {_line(error)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise BaseModelMismatch(
                f"{str(name)!r} is of an architecture that transformers does not have, whose Python files come with the "
                "checkpoint; they would run with your rights: read them, and pass trust_remote_code=True, with a commit as "
                "revision= where it is a repository, if you trust them"
            ) from error
        raise BaseModelMismatch(
            f"cannot load a base model from {str(name)!r} ({_line(error)}); give a local folder with "
            "config.json and safetensors, a GGUF file, a model-hub id that can be reached, or None for the embedded "
            f"{EMBEDDED}"
        ) from error


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def base_config(base: Any) -> Any:
    """Return the config of `base` (a model, a config, a folder or a model-hub id) without reading weights.

    Raises BaseModelMismatch if nothing of that name has a config.
    """
    if not isinstance(base, str | Path):
        return getattr(base, "config", base)
    try:
        if str(base):
            stored = gguf_base(base)
            return AutoConfig.from_pretrained(base if stored is None else stored.folder(), trust_remote_code=False)
        why = "the adapter names none"
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
    raise BaseModelMismatch(
        f"the architecture of the base model {str(base)!r} is needed and cannot be read ({why}); give base=, a model, its "
        "config, or a folder with config.json"
    )


def head_size(config: object) -> int | None:
    """Return the number of outputs of one attention head, from a transformers model's config; None if unknown."""
    text = getattr(config, "text_config", config)
    size, hidden, heads = (getattr(text, name, None) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    return size if isinstance(size, int) and size > 0 else None


def base_id(model: Any) -> str:
    """Return the id or folder that a model was loaded from, which adapters record as their base; "" if unknown."""
    return str(getattr(model, "name_or_path", "") or "")


def base_key(model: nn.Module, *, weights: bool = True) -> BaseKey:
    """Return the model's id, the commit that it was loaded from if transformers knows it, and its fingerprint.

    Without `weights` no parameter is read, and the key has no fingerprint.
    """
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return BaseKey(base_id(model), revision or None, fingerprint(model) if weights else None)


def require_model(model: Any) -> None:
    """Raise CompositionError unless `model` is a torch module without peft's adapters, which would change every answer.

    The message names the part of a pipeline to pass instead, or says how to remove peft's adapters.
    """
    if not isinstance(model, nn.Module):
        # the attributes of pipelines that hold the model that adapters are for
        names = ("transformer", "unet", "model")
        part = next((name for name in names if isinstance(getattr(model, name, None), nn.Module)), None)
        way_out = "load it first, as lw.load_base() does" if part is None else f"pass its .{part}"
        raise CompositionError(f"adapters go onto a model, a torch.nn.Module, not {model!r:.60}: {way_out}")
    # recognised by the module of its classes, since peft itself need not be installed
    for path, module in model.named_modules():
        if not any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            continue
        if module is not model:
            what = f"this model has adapters of peft's in it: layer {path!r} is peft's {type(module).__name__}"
            way_out = "peft's unload() takes them out"
        else:
            what = f"this model is a {type(model).__name__} of peft"
            # prompt learning has no layers to take out
            way = "unload" if hasattr(model, "unload") else "get_base_model"
            way_out = f"pass model.{way}(), the base without its adapters"
        raise CompositionError(
            f"{what}, but adapters are composed on a base without any: {way_out}; model.save_pretrained(folder) first "
            "keeps them, and hub.add(folder) stores the folder"
        )


NUM_TENSORS = 16
SAMPLES_PER_TENSOR = 16


def fingerprint(model: torch.nn.Module) -> Fingerprint:
    """Return a hash of all parameters' names and shapes, with up to 256 weights sampled at fixed places of 16 matrices.

    Buffers, dtype and device do not matter. No weights are sampled if a matrix is on the meta device, of integers or of a
    tensor subclass; a model quantised while it was loaded has the names and shapes that it had before the quantisation.
    """
    require_model(model)
    named = dict(model.named_parameters())
    if getattr(config := getattr(model, "config", None), "quantization_config", None) is not None:
        with torch.device("meta"):
            named = dict(type(model)(copy.deepcopy(config)).named_parameters())  # type: ignore[arg-type]
    own_print, places = sampled_places(named)
    matrices = [parameter for parameter in named.values() if parameter.dim() >= 2]
    if any(p.is_meta or not p.is_floating_point() or type(p) is not nn.Parameter for p in matrices):
        return own_print
    read = [named[name].detach().reshape(-1)[where.to(named[name].device)] for name, where in places]
    return Fingerprint(own_print.shapes, rounded_samples(read))


def sampled_places(named: Mapping[str, torch.Tensor]) -> tuple[Fingerprint, list[tuple[str, torch.Tensor]]]:
    """Return the fingerprint without samples, and (name, places in the flat tensor) of each sampled parameter."""
    shapes = sorted([(name, tuple(parameter.shape)) for name, parameter in named.items()])
    matrices = [(name, math.prod(shape)) for name, shape in shapes if len(shape) >= 2]
    chosen = matrices[:: max(1, len(matrices) // NUM_TENSORS)][:NUM_TENSORS]
    places = [(name, torch.linspace(0, size - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()) for name, size in chosen]
    return Fingerprint(text_digest(repr(shapes))[:32]), places


def rounded_samples(read: Iterable[torch.Tensor]) -> tuple[float, ...]:
    """Return the samples as one tuple, rounded to bf16: a checkpoint loaded in fp32 or in bf16 gives the same figures."""
    return tuple(value for samples in read for value in samples.to(torch.bfloat16).float().tolist())


# how many adapters a warning names
NUM_SHOWN = 3


def require_same_base(who: str, its: BaseKey, own: BaseKey, *, whatever_id: bool = False) -> None:
    """Raise BaseModelMismatch if weights, shapes or commits show that `its`, the base of `who`, differs from the base `own`.

    Commits are compared if the ids are the same, with `whatever_id` also if they differ.
    """
    if why := (replace(its, id=own.id) if whatever_id else its).contradicts(own):
        raise BaseModelMismatch(
            f"{who} was made for another base model ({its.id!r}) than this one ({own.id!r}): {why}; load the model that it "
            "was made for (load_base(...), --base), or leave it out"
        )


def warn_unverified(names: Sequence[str], its: BaseKey, own: BaseKey, *, stacklevel: int = 2) -> None:
    """Warn that only layer names and shapes show that these adapters, made for the base `its`, fit the model `own`."""
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    theirs = f"made for {its.id!r}" if its.id else "made for a base model that they do not name"
    warnings.warn(
        f"{', '.join(map(repr, names[:NUM_SHOWN]))}{more}: {theirs}, while this model "
        f"{f'is {own.id!r}' if own.id else 'has no name'}. Only the names and shapes of the layers could be compared, and "
        "they fit; weights could not, since not both sides have sampled some. If it is the same model, hub.bind(name, "
        "model) stores its fingerprint with the adapter; else load the other one (load_base(...), --base)",
        BaseModelUnverified,
        stacklevel=stacklevel + 1,
    )


def says_nothing(model_id: str) -> bool:
    """Return True if an id identifies no model: it is empty, or a folder on this machine."""
    return not model_id or Path(model_id).is_absolute() or Path(model_id).is_dir()


# the parts of diffusers' pipelines that are trained with LoRA
PIPELINE_PARTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "controlnet",
)


class Parts(nn.Module, ABC):
    """A module whose children are the parts of a pipeline (text encoder, UNet and so on), each of which is called by itself.

    Adapters name a layer by its path in this module, and record `name_or_path` as their base. Entries of the registry
    `pipelines` are such classes; a live hook knows how the parts are called.
    """

    name_or_path: str

    @classmethod
    @abstractmethod
    def of(cls, pipeline: Any) -> Parts | None:
        """Return the parts of a pipeline, or None if this class does not read it."""

    @abstractmethod
    def paths(self, layers: Iterable[str], who: str) -> dict[str, str]:
        """Map an adapter's layers to paths in this module. Raises LayerMismatch, naming `who`, for a layer without one."""

    def require_same_parts(self) -> None:
        """Raise CompositionError if a part of the pipeline was replaced since this module was made."""


def model_of(given: Any) -> Any:
    """Return the `Parts` of a pipeline that an entry of the registry `pipelines` reads; return other objects unchanged."""
    if given is None or isinstance(given, nn.Module):
        return given
    readers = (registry.get("pipelines", name) for name in registry.names("pipelines"))
    return next((parts for reader in readers if (parts := reader.of(given)) is not None), given)
