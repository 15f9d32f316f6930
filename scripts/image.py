"""Run the steps of deploy/Containerfile without a container: its packages and loraweave in a bare virtual environment.

    python scripts/image.py FOLDER                  FOLDER/venv/bin/loraweave is then the image's program
    python scripts/image.py FOLDER --own-torch      with the torch of this Python, where PyTorch's index cannot be reached

What the image gets of the repository lies in FOLDER/src, as COPY and Containerfile.dockerignore say. Every RUN sees the
environment's Python first, and /src as a folder in FOLDER. Users are not made, and pip's cache is used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
# what is made for users of the image alone
OF_USERS = ("useradd", "install --directory")


def instructions() -> list[tuple[str, str]]:
    """Return (name, what follows it) of each instruction of the container file, in order."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = (line.split(maxsplit=1) for line in text.replace("\\\n", "").splitlines() if line.strip())
    return [(name, rest.strip()) for name, rest in lines]


def context() -> list[Path]:
    """Return the files of the repository that the container file's COPY can see, relative to the root."""
    lines = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    shown = [line[1:] for line in lines if line.startswith("!")]
    files = (path for name in shown for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]))
    return [path.relative_to(ROOT) for path in files if path.is_file() and "__pycache__" not in path.parts]


def build(folder: Path, *, own_torch: bool = False) -> Path:
    """Run the steps in an empty folder; return the `bin` of the environment."""
    programs = folder / "venv" / "bin"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    for name, rest in instructions():
        if name == "ENV":
            environment |= dict(word.split("=", 1) for word in rest.split() if word != "PIP_NO_CACHE_DIR=1")
        elif name == "COPY":
            copied, target = rest.split()
            for path in context() if copied == "." else [Path(copied)]:
                place = _place(target, folder) / path if copied == "." else _place(target, folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, place)
            if own_torch and copied != ".":
                _leave_out_torch(_place(target, folder))
                _link_torch(folder / "venv")
        elif name == "RUN":
            steps = [step.strip() for step in rest.split("&&")]
            for step in (step for step in steps if not step.startswith(OF_USERS)):
                words = [str(_place(word, folder)) if word.startswith("/src") else word for word in step.split()]
                subprocess.run(words, env=environment, cwd=folder, check=True)
    return programs


def _place(target: str, folder: Path) -> Path:
    return folder / target.removeprefix("/")


def _leave_out_torch(lock: Path) -> None:
    lock.write_text(re.sub(r"^torch @ .*\\\n(\s+--hash=.*\n)+", "", lock.read_text(), flags=re.MULTILINE))


def _link_torch(venv: Path) -> None:
    """Let an environment import the torch of this Python."""
    distribution = importlib.metadata.distribution("torch")
    packages = next(venv.glob("lib/python*/site-packages"))
    tops = {Path(file).parts[0] for file in distribution.files or ()}
    for name in tops - {"..", "__pycache__"}:
        (packages / name).symlink_to(Path(str(distribution.locate_file(name))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--own-torch", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    print(build(asked.folder.resolve(), own_torch=asked.own_torch))
