"""A mixture of four adapters of one base, by every way that answers it: how far each is from the formula written out.

    python -m benchmarks engines
    python -m benchmarks --pool runs/qwen engines --base qwen2.5-coder-0.5b --gguf BASE.gguf
    python -m benchmarks engines --vllm ENV/bin/python --openvino ENV/bin/python

The ways: the live mixture, the fused weights, the merged adapter in peft, the formula's name on our own server, and the
adapter exported to llama.cpp (beside the GGUF file that the base came from, quantised as it is), to vLLM and to OpenVINO,
each in the engine itself. Compared are the log-probabilities of the whole vocabulary after the last token of each prompt,
in float32, with those of a copy of the base whose weights have the sum of the updates added. No time is measured.

llama.cpp rounds a quantised base's activations, which the copy does not: its row for the base says by how much. OpenVINO
says texts alone; its figure is the number of texts that are the copy's.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import loraweave as lw
from benchmarks._models import in_peft, random_adapters
from benchmarks._run import ROOT, Run, Table, console
from benchmarks._served import serving

app = typer.Typer()

SCRIPTS = ROOT / "tests" / "engine_scripts"
WEIGHTS = (0.7, -0.4, 0.3, 0.2)
PROMPTS = ("The capital of France is", "The opposite of hot is", "def add(a, b):\n    return", "Once upon a time")
NUM_TOKENS = 8
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(frozen=True)
class Mixture:
    """The base in float32, four adapters of it with their weights, the copy that is the formula, and what both answer."""

    model: Any
    tokenizer: Any
    adapters: list[lw.Adapter]
    prompts: list[list[int]]
    copied: Any
    base_PV: Tensor
    expected_PV: Tensor

    @property
    def weights(self) -> dict[str, float]:
        return {adapter.name: weight for adapter, weight in zip(self.adapters, WEIGHTS, strict=True)}

    @property
    def formula(self) -> str:
        return " + ".join(f"{weight}*{name}" for name, weight in self.weights.items()).replace("+ -", "- ")

    @property
    def merged(self) -> lw.Adapter:
        return lw.merge(self.adapters, list(WEIGHTS), method="linear", name="mixture")


@app.command()
def main(
    context: typer.Context,
    base: Annotated[str | None, typer.Option(help="base that --pool was made for, as load_base names it")] = None,
    gguf: Annotated[Path | None, typer.Option(help="the base's GGUF file, for llama.cpp")] = None,
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vLLM")] = None,
    openvino: Annotated[Path | None, typer.Option(help="Python of one with OpenVINO GenAI and optimum")] = None,
) -> None:
    """Distances from the formula written out, of each way to answer it."""
    run: Run = context.obj
    mixture = make(run, base)
    table = Table(
        f"{mixture.formula} on {mixture.model.name_or_path}",
        ("way", "largest difference of log-probabilities", "same next token", "of what the mixture changes"),
    )
    ways: dict[str, Callable[[], dict[str, Tensor | str]]] = {
        "live": lambda: live(mixture),
        "fused": lambda: fused(mixture),
        "peft": lambda: {"merged, in peft": answers(in_peft(mixture.model, [mixture.merged]), mixture.prompts)},
        "our server": lambda: served(mixture, base),
    }
    if gguf is not None:
        ways["llama.cpp"] = lambda: llama_cpp(mixture, gguf)
    if vllm is not None:
        ways["vLLM"] = lambda: in_vllm(mixture, vllm)
    if openvino is not None:
        ways["OpenVINO"] = lambda: in_openvino(mixture, openvino)
    for name, way in ways.items():
        console.print(f"{name} ..")
        for label, said in way().items():
            table.add(label, *([said, "", ""] if isinstance(said, str) else figures(mixture, label, said)))
    run.show(table)


def make(run: Run, base: str | None) -> Mixture:
    """The first four adapters of --pool that are of this base, else random ones on all linear layers of the blocks."""
    model, tokenizer = lw.load_base(base, dtype=torch.float32)
    model.requires_grad_(False)
    stored = [lw.Adapter.from_pretrained(path) for path in run.adapters()[: len(WEIGHTS)]]
    if any(adapter.base_model != model.name_or_path for adapter in stored) or len(stored) < len(WEIGHTS):
        stored = random_adapters(model, len(WEIGHTS), "all", run.seed)
    copied = copy.deepcopy(model)
    for adapter, weight in zip(stored, WEIGHTS, strict=True):
        for layer, factors in adapter.layers.items():
            copied.get_submodule(layer).weight += weight * factors.b_OR.float() @ factors.a_RI.float()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return Mixture(model, tokenizer, stored, prompts, copied, answers(model, prompts), answers(copied, prompts))


@torch.inference_mode()
def answers(model: Any, prompts: Sequence[list[int]]) -> Tensor:
    """Log-probabilities of the token after each prompt, prompts x vocabulary."""
    return torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts])


def figures(mixture: Mixture, label: str, said_PV: Tensor) -> list[str]:
    """The largest difference, the number of equal next tokens, and the difference as a share of what the mixture changes."""
    expected_PV = mixture.base_PV if label.endswith("base alone") else mixture.expected_PV
    difference = float((said_PV - expected_PV).abs().max())
    same = int((said_PV.argmax(-1) == expected_PV.argmax(-1)).sum())
    change = float((mixture.expected_PV - mixture.base_PV).abs().max())
    return [f"{difference:.1e}", f"{same} of {len(PROMPTS)}", f"{difference / change:.1e}"]


def live(mixture: Mixture) -> dict[str, Tensor | str]:
    with lw.Composer(mixture.model, mixture.adapters).activate(mixture.weights):
        return {"live": answers(mixture.model, mixture.prompts)}


def fused(mixture: Mixture) -> dict[str, Tensor | str]:
    with lw.Composer(mixture.model, mixture.adapters).fused(mixture.weights):
        said_PV = answers(mixture.model, mixture.prompts)
    return {"fused": said_PV, "unfused again, the base alone": answers(mixture.model, mixture.prompts)}


def served(mixture: Mixture, base: str | None) -> dict[str, Tensor | str]:
    """Our server tells the 20 likeliest tokens; the others stand as the copy has them."""
    said_PV = mixture.expected_PV.clone()
    ids_of = {mixture.tokenizer.decode([token]): token for token in range(said_PV.shape[1])}
    with tempfile.TemporaryDirectory() as folder:
        with lw.Hub(folder) as hub:
            for adapter in mixture.adapters:
                hub.add(adapter)
        words = () if base is None else ("--base", base)
        with serving(Path(folder), None, "--dtype", "float32", *words) as server:
            for said_V, ids in zip(said_PV, mixture.prompts, strict=True):
                asked = {"model": mixture.formula, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20}
                status, body = server.post("/v1/completions", asked)
                if status != 200:
                    raise RuntimeError(f"status {status}: {body}")
                [likeliest] = body["choices"][0]["logprobs"]["top_logprobs"]
                for token, logprob in likeliest.items():
                    said_V[ids_of[token]] = logprob
    return {"our server, 20 likeliest": said_PV}


def llama_cpp(mixture: Mixture, gguf: Path) -> dict[str, Tensor | str]:
    with tempfile.TemporaryDirectory() as folder:
        report = mixture.merged.export(Path(folder) / "adapter", target="gguf", base=mixture.model)
        requests = [[ids, [strength]] for strength in (0.0, 1.0) for ids in mixture.prompts]
        job = {"model": str(gguf), "adapters": [str(report.folder / "adapter.gguf")], "requests": requests}
        [said] = ask(sys.executable, "llama_cpp.py", [{**job, "vocabulary": mixture.expected_PV.shape[1]}])
    said_PV, number = torch.tensor(said), len(mixture.prompts)
    return {"llama.cpp, the base alone": said_PV[:number], f"llama.cpp beside {gguf.name}": said_PV[number:]}


def in_vllm(mixture: Mixture, python: Path) -> dict[str, Tensor | str]:
    with tempfile.TemporaryDirectory() as folder:
        saved(mixture, Path(folder) / "base")
        report = mixture.merged.export(Path(folder) / "adapter", target="vllm")
        job = {"model": f"{folder}/base", "adapter": str(report.folder), "prompts": mixture.prompts}
        sizes = {"vocabulary": mixture.expected_PV.shape[1], "max_lora_rank": max(8, report.rank)}
        [(without, adapted)] = ask(python, "vllm_answers.py", [{**job, **sizes}], VLLM)
    return {"vLLM, the base alone": torch.tensor(without), "vLLM": torch.tensor(adapted)}


def in_openvino(mixture: Mixture, python: Path) -> dict[str, Tensor | str]:
    with tempfile.TemporaryDirectory() as folder:
        saved(mixture, Path(folder) / "base")
        report = mixture.merged.export(Path(folder) / "adapter", target="openvino")
        adapter = str(report.folder / "adapter_model.safetensors")
        job = {"model": f"{folder}/base", "adapter": adapter, "prompts": PROMPTS, "tokens": NUM_TOKENS}
        [(without, adapted)] = ask(python, "openvino_texts.py", [job])
    counts: dict[str, Tensor | str] = {}
    for label, model, said in (("OpenVINO, the base alone", mixture.model, without), ("OpenVINO", mixture.copied, adapted)):
        same = sum(theirs == ours for theirs, ours in zip(said, texts(model, mixture), strict=True))
        counts[label] = f"{same} of {len(PROMPTS)} texts of {NUM_TOKENS} tokens"
    return counts


def saved(mixture: Mixture, folder: Path) -> None:
    mixture.model.save_pretrained(folder)
    mixture.tokenizer.save_pretrained(folder)


@torch.inference_mode()
def texts(model: Any, mixture: Mixture) -> list[str]:
    """What the model goes on with after each prompt, greedily."""
    said = []
    for ids in mixture.prompts:
        begun = list(ids)
        for _ in range(NUM_TOKENS):
            begun.append(int(model(torch.tensor([begun])).logits[0, -1].argmax()))
        said.append(mixture.tokenizer.decode(begun[len(ids) :], skip_special_tokens=True))
    return said


def ask(python: str | Path, script: str, jobs: Any, environment: Mapping[str, str] = {}) -> Any:
    """What an engine's script says to `jobs`, both JSON. RuntimeError with the end of its output where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, said = Path(folder) / "asked.json", Path(folder) / "said.json"
        asked.write_text(json.dumps(jobs), encoding="utf-8")
        call = [str(python), str(SCRIPTS / script), str(asked), str(said)]
        variables = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **environment}
        done = subprocess.run(call, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{script} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        return json.loads(said.read_text(encoding="utf-8"))


if __name__ == "__main__":
    app()
