"""Reads folders that ask for far more than they hold, under a limit of memory."""

import json

import folders
import fuzz

from loraweave.hub.hub import Hub

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "loraweave.json"
ENTRY = b'"base_model.model.l%d.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def _header(text):
    return {**folders.folders()["plain"], WEIGHTS: folders.packed(text, b"")}


def _file(name, text):
    return {**folders.folders()["plain"], name: text}


def _many(part, count, begin=b'{"a":[', end=b"]}"):
    return begin + b",".join([part] * count) + end


def _entries(count):
    return b"{" + b",".join(ENTRY % at for at in range(count)) + b"}"


def _numbered(count):
    return b",".join(b'"%d":""' % at for at in range(count))


def _lokr(first, second):
    path = "base_model.model.layers.0.q_proj."
    tensors = {f"{path}lokr_w1": folders.values(*first, seed=1), f"{path}lokr_w2": folders.values(*second, seed=2)}
    return {**folders.folders()["lokr"], WEIGHTS: folders.safetensors(tensors)}


def _tall(rank, side):
    path = "base_model.model.layers.0.q_proj."
    tensors = {f"{path}lora_A.weight": folders.values(rank, side), f"{path}lora_B.weight": folders.values(side, rank)}
    return {**folders.folders()["plain"], CONFIG: folders.config(r=rank), WEIGHTS: folders.safetensors(tensors)}


# the quick ones first; each is made when its turn comes
CASES = {
    "a million tensors": lambda: _header(_entries(1_000_000)),
    "two million entries of metadata": lambda: _header(b'{"__metadata__":{' + _numbered(1_900_000) + b"}}"),
    "a Kronecker product of 13 GB": lambda: _lokr((200, 200), (200, 200)),
    "a rank of 30,000 on a layer of four": lambda: _tall(30_000, 4),
    "200,000 patterns": lambda: _file(CONFIG, folders.config(rank_pattern={f"l{at}": 2 for at in range(200_000)})),
    "a card of empty lists": lambda: _file(CARD, _many(b"[]", 1_390_000)),
    "200,000 tensors of nothing": lambda: _header(_entries(199_999)),
    "a header of objects": lambda: _header(_many(b"{}", 1_900_000)),
    "a header of lists": lambda: _header(_many(b"[]", 1_900_000)),
    "a header of numbers": lambda: _header(_many(b"9999", 3_900_000)),
    "a text of 90 MB": lambda: _header(b'{"__metadata__":{"a":"' + b"x" * 90_000_000 + b'"}}'),
    "a text of 30 MB that needs four bytes a letter": lambda: _header(b'{"a":"' + b"x" * 30_000_000 + "😀".encode() + b'"}'),
    "a key of 90 MB": lambda: _header(b'{"' + b"x" * 90_000_000 + b'":1}'),
    "90 MB of spaces": lambda: _header(b"{" + b" " * 90_000_000 + b"}"),
    "a number of nine million digits": lambda: _header(b'{"a":' + b"9" * 9_000_000 + b"}"),
    "a config of objects": lambda: _file(CONFIG, _many(b"{}", 1_390_000)),
    "a config of keys": lambda: _file(CONFIG, b"{" + _numbered(330_000) + b"}"),
    "300,000 target modules": lambda: _file(CONFIG, folders.config(target_modules=[f"l{at}" for at in range(300_000)])),
    "a description of 4 MB": lambda: _file(CARD, b'{"description":"' + b"x" * 4_000_000 + b'"}'),
    "600,000 examples": lambda: _file(CARD, json.dumps({"examples": ["x"] * 600_000}).encode()),
    "front matter of lists": lambda: _file("README.md", b"---\na: [" + b"[]," * 15_000 + b"]\n---\n"),
    "a Kronecker product of one row": lambda: _lokr((1, 20_000), (1, 20_000)),
}


def report(folder, count):
    """The class of the error of each of the first `count` cases, or "added", and what is wrong with that."""
    found = {}
    with fuzz.prepared(folder), Hub(folder / "hub") as hub:
        for files in folders.folders().values():
            # the first call imports, which is not the folder's doing
            fuzz.put(files, folder / "case")
            fuzz.taken(hub, folder / "case", None)
        for name, make in list(CASES.items())[:count]:
            files = make()
            fuzz.put(files, folder / "case")
            limits = fuzz.Limited(sum(map(len, files.values())), allowance_bytes=256 * 2**20, seconds=60.0)
            found[name] = fuzz.outcome(hub, folder / "case", None, limits)
    return found
