"""The wheel: built from a copy of the checkout, unpacked, and used where neither checkout nor editable install is seen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOMS = ("hub", "retrieval", "routers", "composer", "serving", "extensions")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel's path."""
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, sources]
    run = subprocess.run([str(part) for part in build], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    [found] = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_with(unpacked, code, folder, *arguments):
    """Runs code with the wheel and the installed dependencies alone.

    -S leaves site and with it every .pth file out, so that an editable install of this project cannot step in, and -I
    the current folder and PYTHONPATH; the dependencies' folder is put on the path by hand.
    """
    dependencies = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    start = f"import sys; sys.path[:0] = {[str(unpacked)]!r}; sys.path.extend({dependencies!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder, env=environment)


def test_the_wheel_has_every_source_file_under_loraweave_and_no_other_package(wheel):
    # the rooms are links there, which rglob does not follow
    front = (path for path in (ROOT / "loraweave").rglob("*") if path.suffix in (".py", ".pyi"))
    expected = {path.relative_to(ROOT).as_posix() for path in front} | {"loraweave/py.typed"}
    for room in ROOMS:
        expected |= {
            f"loraweave/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / room).rglob("*.[cp]*")
            if path.suffix in (".c", ".py", ".pyi")
        }
        expected |= {f"loraweave/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("page_files/*")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not re.search(r"\.dist-info/|^loraweave/examples/", name)} == expected
    assert {"loraweave/hub/hub.py", "loraweave/composer/merge/methods/linear.py"} <= expected


def test_the_wheel_has_the_files_of_the_demo_and_no_other_example(wheel):
    parts = ("pool/*/*", "in_context/*", "data/MANIFEST.json", "data/unseen/*", "data/licences/*")
    expected = {path.relative_to(ROOT).as_posix() for part in parts for path in (ROOT / "examples").glob(part)}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.removeprefix("loraweave/") for name in names if name.startswith("loraweave/examples/")} == expected
    assert sum(name.endswith("/adapter_model.safetensors") for name in expected) == 34


def test_the_wheel_has_its_licence_and_the_metadata_of_the_project(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert {"licenses/LICENSE", "licenses/NOTICE", "METADATA", "entry_points.txt"} <= set(names)
    metadata = archive.read(names["METADATA"]).decode()
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)
    assert re.search(r"^Requires-Python: >=3\.11$", metadata, re.MULTILINE)
    assert "loraweave = loraweave.cli:main" in archive.read(names["entry_points.txt"]).decode()


def test_every_module_imports_from_the_wheel_alone(unpacked, tmp_path):
    code = """
import importlib, json, pkgutil
import loraweave, loraweave.composer.composer
for module in pkgutil.walk_packages(loraweave.__path__, "loraweave."):
    if module.name != "loraweave.__main__":
        importlib.import_module(module.name)
print(json.dumps({name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "loraweave"}))
"""
    run = run_with(unpacked, code, tmp_path)
    assert run.returncode == 0, run.stderr
    files = json.loads(run.stdout.splitlines()[-1])
    assert {"loraweave.composer.composer", "loraweave.hub.formats.peft"} <= set(files)
    assert [name for name, file in files.items() if not Path(file).is_relative_to(unpacked)] == []


def test_no_room_is_importable_by_its_bare_name(unpacked, tmp_path):
    code = f"""
import importlib.util
print([name for name in {ROOMS!r} if importlib.util.find_spec(name)])
"""
    assert run_with(unpacked, code, tmp_path).stdout.strip() == "[]"


def test_a_copy_of_the_tests_passes_with_the_wheel_outside_the_checkout(unpacked, tmp_path):
    copied = tmp_path / "tests"
    # with what the tests share
    chosen = [path.name for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")]
    chosen += ["test_errors.py", "test_types.py", "test_registry.py", "lowrank/test_algebra.py", "hub/test_adapter.py"]
    chosen += ["hub/test_pool.py", "routers/test_weights.py", "composer/live/test_mixer.py"]
    folders = {parent for name in chosen for parent in Path(name).parents} - {Path()}
    chosen += [str(folder / "conftest.py") for folder in folders if (ROOT / "tests" / folder / "conftest.py").is_file()]
    for name in chosen:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, copied / name)
    shutil.copy(ROOT / "scripts" / "shown.py", copied)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = tests\nmarkers =\n    slow: real model\n    gpu: CUDA\n")
    code = "import pytest\nsys.exit(pytest.main(['--import-mode=importlib', '-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    run = run_with(unpacked, code, tmp_path, copied)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert re.search(r"\d{2,} passed", run.stdout)
