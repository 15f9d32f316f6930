"""Ternary adapters in few bits: compeft.safetensors and compeft.json (ComPEFT, Yadav et al. 2023, arXiv 2311.13171).

The layout is this library's own: the paper's authors defined none. `packings/compeft.py` has the stream.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors, Fingerprint
from loraweave.extend import replacing, require_replaceable
from loraweave.extend.formats import Contents, entry, json_text, present, read_json, read_tensors, require_finite
from loraweave.extend.hubs import put_together, take_apart

DESCRIPTION = "compeft.json"
WEIGHTS = "compeft.safetensors"
FORMAT_VERSION = 1


class Compeft:
    """The reader and writer of folders of ternary adapters; what was written is read back bit for bit."""

    files = ("compeft.*",)

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Return True if the folder has a file of this layout; the file's contents are not checked."""
        return any(present(folder, name) for name in (DESCRIPTION, WEIGHTS))

    @staticmethod
    def read(folder: Path) -> Contents:
        """Return the layers, heads, base model, fingerprint and card of a folder.

        Raises AdapterCorrupt for damaged files (every size is checked before memory is allocated), AdapterUnsupported for an
        adapter without effect.
        """
        folder = Path(folder)
        description = read_json(folder, DESCRIPTION)
        tensors: dict[str, Tensor] = {}
        for key, dtype, tensor in read_tensors(folder, [WEIGHTS], integers=True):
            if dtype not in ("U8", "F32"):
                raise AdapterCorrupt(f"{WEIGHTS} has a tensor of dtype {dtype}, and this form has U8 and F32 only")
            require_finite(tensor, str(folder), repr(key))
            tensors[key] = tensor.to(torch.uint8) if dtype == "U8" else tensor
        try:
            if description["version"] != FORMAT_VERSION:
                raise ValueError(f"its version is {description['version']!r:.60}, not {FORMAT_VERSION}")
            layers, heads = put_together(description, tensors.keys(), tensors.__getitem__)
            stored = description["fingerprint"]
            fingerprint = None if stored is None else Fingerprint.from_json(stored)
            base_model, card = entry(description, "base_model", str), entry(description, "card", dict)
            if base_model is None or card is None or entry({"name": "", **card}, "name", str) is None:
                raise ValueError("its base_model, card or name are of another type")
            for layer, factors in layers.items():
                _check(layer, factors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterCorrupt(f"{folder}: cannot be read ({type(error).__name__}: {error})") from error
        contents = Contents(base_model, layers, fingerprint, card, heads)
        contents.require_effect(str(folder))
        return contents

    @staticmethod
    def write(contents: Contents, folder: Path) -> Path:
        """Write the folder, which appears whole or not at all, and return its path.

        An existing one is replaced only if it is empty or holds nothing but such an adapter (else AdapterExists). Raises
        AdapterUnsupported for factors that are not ternary (`compeft` of the extension `methods` makes them so), for
        invocation tokens, and for a card that is not JSON.
        """
        folder = Path(folder)
        if contents.invocation:
            raise AdapterUnsupported("ComPEFT's layout has no place for invocation tokens: write a PEFT folder")
        description, tensors = take_apart(contents.layers, contents.heads, stored_as="compeft")
        contents.require_effect(f"cannot write to {folder}")
        head = {
            "version": FORMAT_VERSION,
            "base_model": contents.base_model,
            "fingerprint": None if contents.fingerprint is None else contents.fingerprint.to_json(),
            "card": contents.card,
        }
        files = {DESCRIPTION: json_text({**head, **description}, "the description").encode(), WEIGHTS: save(tensors)}
        with replacing(require_replaceable(folder, lambda path: path.name in files)) as new:
            for name, data in files.items():
                (new / name).write_bytes(data)
        return folder


def _check(layer: str, factors: Factors) -> None:
    """Raise ValueError if a layer's factors, kernel size and vectors (gain, bias ..) do not fit each other."""
    num_out, rank = factors.b_OR.shape
    kernel_fits = all(type(size) is int and size > 0 for size in factors.kernel)
    if type(layer) is not str or factors.rank != rank or not kernel_fits:
        raise ValueError(f"layer {layer!r:.60} has factors or a kernel that do not fit")
    for part, tensor in factors.tensors().items():
        if part not in ("a_RI", "b_OR") and tuple(tensor.shape) != (num_out,):
            raise ValueError(f"layer {layer!r} has {part} of shape {tuple(tensor.shape)}, not ({num_out},)")
