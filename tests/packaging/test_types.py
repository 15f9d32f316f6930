"""Type checkers know every public name of an editable install, and no other.

The user's environment has this project alone, without torch: its names and signatures do not depend on that.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile

import pytest

import loraweave as lw

pytestmark = pytest.mark.slow

SCRIPT = """import loraweave as lw

hub = lw.Hub("adapters")
adapters: list[lw.Adapter] = [hub[hit.name] for hit in hub.search("Negate the sentence.", k=2)]
model, tokenizer = lw.load_base()
task = lw.Task([("a", "b")], instruction="Negate.")
weights: dict[str, float] = lw.compose(model, tokenizer, hub, task, method="auto").mean_weights
with lw.Composer(model, lw.ExpertPool(adapters)).activate(weights):
    lw.merge(adapters, [0.7, 0.3], method="ties").save_pretrained("merged")
"""
MISTAKES = {"lw.mergee(adapters)": "mergee", "hub.add('folder', nam='x')": "nam", "weights.append(1)": "append"}


@pytest.fixture(scope="module")
def python(sources, tmp_path_factory):
    """The interpreter of an environment with an editable install, which is what pip puts there: the unpacked wheel."""
    folder, built = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("built")
    venv.create(folder, with_pip=False)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(built)!r})"
    run = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, timeout=300, cwd=sources)
    assert run.returncode == 0, run.stdout + run.stderr
    [wheel] = built.glob("*.whl")
    [packages] = folder.glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return folder / "bin" / "python"


def complaints(checker, python, folder, text):
    """What the checker says of a script that a user of that interpreter wrote, one line each."""
    (folder / "script.py").write_text(text)
    options = {"mypy": ["--python-executable", python, "--no-error-summary"], "basedpyright": ["--pythonpath", python]}
    words = [sys.executable, "-m", checker, *options[checker], "script.py"]
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=400, cwd=folder)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if ": error" in line or " - error" in line]


@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_a_script_passes_and_each_of_its_mistakes_is_seen(checker, python, tmp_path):
    pytest.importorskip(checker)
    assert complaints(checker, python, tmp_path, SCRIPT) == []
    found = complaints(checker, python, tmp_path, SCRIPT + "\n".join(MISTAKES) + "\n")
    assert len(found) == len(MISTAKES)
    for line, name in zip(found, MISTAKES.values(), strict=True):
        assert f'"{name}"' in line


def test_no_public_name_is_any_to_mypy(python, tmp_path):
    text = "import loraweave as lw\n" + "".join(f"reveal_type(lw.{name})\n" for name in lw.__all__)
    (tmp_path / "names.py").write_text(text)
    words = [sys.executable, "-m", "mypy", "--python-executable", python, "names.py"]
    run = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=400, cwd=tmp_path)
    types = [line.partition("Revealed type is ")[2] for line in run.stdout.splitlines() if "Revealed type" in line]
    assert len(types) == len(lw.__all__)
    # wrapped by a decorator of torch, which is not there
    assert {name for name, kind in zip(lw.__all__, types, strict=True) if kind == '"Any"'} <= {"extract", "to_lora"}
