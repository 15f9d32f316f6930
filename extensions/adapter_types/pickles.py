"""Reading adapter_model.bin after explicit consent: an archive of torch.save whose pickle names only tensors.

The names of the pickle's classes are checked before anything is built from it, and torch's safe loader (`weights_only=True`)
builds the tensors. The archive may not claim more bytes than the file has.
"""

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extend.formats import FLOATS, INTEGERS, open_file

# the limits of safetensors: of the bytes that describe the tensors, of their number, and of a name
MAX_PICKLE_BYTES, MAX_TENSORS, MAX_KEY_LENGTH = 100 * 10**6, 200_000, 512

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
# ways to name a class that torch.save does not use for a table of tensors
_OTHER_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_NAMES = {dtype: name for name, dtype in {**FLOATS, **INTEGERS}.items()}


def is_pickle(name: str) -> bool:
    """Return True if a file of this name is a pickle: anything but safetensors."""
    return not name.endswith(".safetensors")


def read_pickle(folder: Path, name: str, *, integers: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (key, dtype as safetensors names it, tensor in fp32) for every tensor in a file `name` that torch.save wrote.

    With `integers`, tensors of whole numbers are read too, as int64. Raises AdapterUnsupported, naming it, for any class but
    plain tensors, and AdapterCorrupt for a damaged archive or one that claims more bytes than the file has.
    """
    with open_file(folder, name) as (file, size):
        where = f"{folder}: {name}"
        _check_classes(_pickle_in(file, size, where), where)
        file.seek(0)
        try:
            table = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever its input makes it run into
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise AdapterCorrupt(f"{where} cannot be read by torch's safe loader: {reason[:200]}") from error
    _check_table(table, size, where, FLOATS.values() if not integers else [*FLOATS.values(), *INTEGERS.values()])
    while table:
        key = next(iter(table))
        tensor = table.pop(key).detach()
        yield key, _NAMES[tensor.dtype], tensor.float().contiguous() if tensor.is_floating_point() else tensor.long()


def texts_in_pickle(folder: Path, name: str) -> list[str]:
    """Return the strings in a torch file's pickle, building no object. Raises AdapterUnsupported for other classes."""
    with open_file(folder, name) as (file, size):
        where = f"{folder}: {name}"
        return _check_classes(_pickle_in(file, size, where), where)


def _pickle_in(file: BinaryIO, size: int, where: str) -> bytes:
    """Return the archive's pickle, after checking that its entries are uncompressed and fit into the file's `size` bytes."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            held = [entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
            if len(held) != 1 or any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise AdapterUnsupported(f"{where} is an archive, but not one that torch.save made of a table of tensors")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise AdapterCorrupt(f"{where} has compressed or encrypted entries, which torch.save never writes")
            # reading allocates the compressed size and returns the file size
            if odd := next((entry for entry in entries if entry.compress_size != entry.file_size), None):
                raise AdapterCorrupt(
                    f"{where}: entry {odd.filename!r:.80} has {odd.file_size} bytes, but {odd.compress_size} in the archive"
                )
            claimed = sum(entry.file_size for entry in entries)
            if claimed > size or held[0].file_size > MAX_PICKLE_BYTES:
                raise AdapterCorrupt(
                    f"{where} claims {claimed} bytes in {len(entries)} entries, {held[0].file_size} of them the pickle; the "
                    f"file has {size} bytes, and a pickle may have {MAX_PICKLE_BYTES}"
                )
            return archive.read(held[0])
    except (AdapterCorrupt, AdapterUnsupported):
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, RuntimeError) as error:
        raise AdapterCorrupt(
            f"{where} is not an intact archive of torch.save ({error!s:.300}); files of PyTorch before 1.6 are not "
            "supported, load and save them again with a newer one"
        ) from error


def _check_classes(raw: bytes, where: str) -> list[str]:
    """Return the pickle's strings. Raises AdapterUnsupported if it names a class that is not in ALLOWED."""
    num_tensors, texts = 0, []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            named = opcode.name == "GLOBAL"
            if opcode.name in _OTHER_WAYS or (named and argument not in ALLOWED):
                what = str(argument).replace(" ", ".")[:120] if named else f"a class by the opcode {opcode.name}"
                raise AdapterUnsupported(
                    f"{where} wants {what}; only tensors are read from a pickle, since anything else may run code when it "
                    "is built. Save the tensors alone, as safetensors"
                )
            num_tensors += opcode.name == "BINPERSID"
            texts += [str(argument)] if opcode.name == "BINUNICODE" else []
    except AdapterUnsupported:
        raise
    except Exception as error:  # genops raises several kinds for a pickle that was cut off
        raise AdapterCorrupt(f"{where} holds a damaged pickle: {error}") from error
    if num_tensors > MAX_TENSORS:
        raise AdapterCorrupt(f"{where} holds {num_tensors} tensors, more than the limit of {MAX_TENSORS}")
    return texts


def _check_table(table: object, size: int, where: str, dtypes: object) -> None:
    if not isinstance(table, dict):
        raise AdapterUnsupported(f"{where} holds a {type(table).__name__}, not a table of tensors by name")
    total = 0
    for key, value in table.items():
        if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY_LENGTH or not key.isprintable():
            raise AdapterCorrupt(f"{where} has the key {key!a:.60}, which is not printable text of up to {MAX_KEY_LENGTH}")
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise AdapterUnsupported(f"{where} holds a {type(value).__name__} under {key!r}, not a plain tensor")
        if value.dtype not in dtypes:  # type: ignore[operator]
            raise AdapterUnsupported(f"{where}: tensor {key!r} has dtype {value.dtype}, which has no exact meaning here")
        num_bytes = value.numel() * value.itemsize
        total += num_bytes
        # strides of 0 make tensors of any size out of one number
        if num_bytes > size or total > 2 * size:
            raise AdapterCorrupt(
                f"{where}: tensor {key!r} of shape {tuple(value.shape)} needs {num_bytes} bytes, all up to it {total}; the "
                f"file has {size}"
            )
