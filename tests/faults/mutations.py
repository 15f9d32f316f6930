"""Ways to spoil an adapter folder: each takes a random generator and files (name -> bytes or Special), and changes one."""

import io
import json
import pickle
import struct
import zipfile
from dataclasses import dataclass

import folders

COUNTS = [0, 1, 2, 3, -1, 7, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 1.5, True, None, "2", []]
VALUES = [None, True, False, -1, 0, 1, 0.5, 1e308, -1e308, 10**400, "", "x", "x" * 20_000, "\0", "..", [], [[]], {}]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I8", "U8", "BOOL", "C64", "f32", "", 7]
KEYS = [
    "", " ", "\0", "\n", "../../etc/passwd", "/etc/passwd", "C:\\x", "x" * 10_000, "\u202eabc", "\ud83d\ude00", "\ud800",
    "__metadata__", "lora_A.weight", "base_model.model.lora_A.weight", "base_model.model.x.lora_A.weight", "a" + ".b" * 600,
    "base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "base_model.model.layers.0.q_proj.lora_embedding_A",
]  # fmt: skip
TYPES = ["LORA", "LOHA", "LOKR", "IA3", "VERA", "ADALORA", "OFT", "BOFT", "HRA", "FOURIERFT", "XLORA", "CPT", "lora", 7]
PATTERNS = [r"(a+)+$", r"(.*)*x", "[", "(?P<n>", "\\", "layers.(0|1)", ".*", "x" * 2_000, "(?i)q", "{9999999999}"]
FIELDS = [
    "peft_type", "r", "lora_alpha", "alpha", "bias", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "target_modules", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "layer_replication", "task_type", "revision",
    "base_model_name_or_path", "trainable_token_indices", "megatron_config", "unknown_field", "exclude_modules",
]  # fmt: skip
CARD_FIELDS = ["fingerprint", "layout", "name", "description", "tags", "examples", "license"]
SHARDS = [
    "../x.safetensors", "/etc/passwd", "adapter_config.json", "", 7, None, "missing.safetensors", "\0.safetensors",
    "x" * 300 + ".safetensors",
]  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 12345\n" % 7


@dataclass(frozen=True)
class Special:
    """What stands in place of a file: a "link" to a target, a "pipe" or a "folder"."""

    kind: str
    target: str = ""


class Canary:
    """A pickle that would leave a file behind if anything ran it."""

    def __reduce__(self):
        return exec, ("open('canary', 'w').close()",)


def weights(rng, files):
    return rng.choice(sorted(name for name in files if name.endswith(".safetensors")))


def texts(rng, files):
    return rng.choice(sorted(name for name in files if not name.endswith(".safetensors")))


def cut_off(rng, files):
    name = rng.choice(sorted(files))
    files[name] = files[name][: rng.randint(0, len(files[name]))]


def flipped(rng, files):
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    files[name] = bytes(data)


def spliced(rng, files):
    name = rng.choice(sorted(files))
    data = files[name]
    begin, end, place = (rng.randint(0, len(data)) for _ in range(3))
    files[name] = data[:place] + data[begin:end] + data[place:]


def extended(rng, files):
    name = rng.choice(sorted(files))
    files[name] += rng.choice([b"\0", b"}", b"\0" * 4096, rng.randbytes(9)])


def header_length(rng, files):
    name = weights(rng, files)
    size = len(files[name])
    length = rng.choice([0, 1, 2, size, size - 8, size - 7, 2**31, 2**32, 2**63, 2**64 - 1, rng.randint(0, size)])
    files[name] = struct.pack("<Q", length) + files[name][8:]


def entry_changed(rng, files):
    name, table, data = _opened(rng, files)
    entry = table.get(rng.choice(sorted(table)))
    if isinstance(entry, dict):
        field = rng.choice(["dtype", "shape", "data_offsets", "drop", "extra", "reshape"])
        if field == "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        elif field == "shape":
            entry["shape"] = [rng.choice(COUNTS) for _ in range(rng.choice([0, 1, 2, 2, 3, 9]))]
        elif field == "data_offsets":
            entry["data_offsets"] = [rng.choice([*COUNTS, len(data)]) for _ in range(rng.choice([1, 2, 2, 2, 3]))]
        elif field == "drop":
            entry.pop(rng.choice(sorted(entry)), None)
        elif field == "extra":
            entry["strides"] = rng.choice(VALUES)
        else:
            _reshape(rng, entry)
    _close(files, name, table, data)


def _reshape(rng, entry):
    """The same number of bytes in another shape or dtype."""
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(count) is int and 0 < count < 1000 for count in shape):
        return
    count = 1
    for size in shape:
        count *= size
    flat = [[count], [count, 1], [1, count], [count, 1, 1, 1]]
    entry["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape], [0, 2**40], *flat])


def entries_moved(rng, files):
    name, table, data = _opened(rng, files)
    entries = [entry for entry in table.values() if isinstance(entry, dict) and "data_offsets" in entry]
    if len(entries) > 1:
        one, other = rng.sample(entries, 2)
        places = one["data_offsets"], other["data_offsets"]
        one["data_offsets"], other["data_offsets"] = rng.choice([places[::-1], places[:1] * 2])
    _close(files, name, table, data)


def key_changed(rng, files):
    name, table, data = _opened(rng, files)
    key = rng.choice(sorted(table))
    new = rng.choice([*KEYS, key.replace("lora_A", "lora_B"), key.replace("base_model.model.", ""), key.upper(), f"{key}.x"])
    table[new] = table.pop(key)
    _close(files, name, table, data)


def key_twice(rng, files):
    name = weights(rng, files)
    header, data = folders.unpacked(files[name])
    files[name] = folders.packed(header.rstrip()[:-1] + b"," + header.lstrip()[1:], data)


def metadata_changed(rng, files):
    name, table, data = _opened(rng, files)
    table["__metadata__"] = rng.choice(
        [*VALUES, {"a": 1}, {"a": "x" * 300_000}, {str(at): "" for at in range(3_000)}, {"a": ["b"]}, {"\0": "\ud800"}]
    )
    _close(files, name, table, data)


def header_replaced(rng, files):
    name = weights(rng, files)
    _, data = folders.unpacked(files[name])
    files[name] = folders.packed(_odd_json(rng), data)


def data_changed(rng, files):
    name = weights(rng, files)
    header, data = folders.unpacked(files[name])
    filler = rng.choice([b"\0", b"\xff", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0"])
    begin = rng.choice([0, 0, rng.randint(0, len(data))])
    files[name] = folders.packed(header, data[:begin] + (filler * (len(data) // len(filler) + 1))[: len(data) - begin])


def field_changed(rng, files):
    name = texts(rng, files)
    try:
        table = json.loads(files[name])
    except ValueError:
        return flipped(rng, files)
    if not isinstance(table, dict):
        return None
    field = rng.choice(
        [*sorted(table), *FIELDS, "fingerprint", "layout", "name", "description", "tags", "examples", "license"]
    )
    value = rng.choice([*VALUES, *COUNTS, *TYPES, {"q_proj": rng.choice(COUNTS)}, "drop"])
    if value == "drop":
        table.pop(field, None)
    else:
        table[field] = value
    files[name] = json.dumps(table).encode()
    return None


def type_changed(rng, files):
    if "adapter_config.json" in files:
        files["adapter_config.json"] = folders.config(
            peft_type=rng.choice(TYPES), **{rng.choice(FIELDS[1:]): rng.choice(VALUES)}
        )


def pattern_changed(rng, files):
    field = rng.choice(["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
    pattern = rng.choice(PATTERNS)
    files["adapter_config.json"] = folders.config(**{field: {pattern: 2} if field.endswith("pattern") else pattern})


def json_replaced(rng, files):
    files[texts(rng, files)] = _odd_json(rng)


def encoded_otherwise(rng, files):
    name = texts(rng, files)
    content = files[name].decode("utf-8", "replace")
    files[name] = rng.choice(
        [content.encode("utf-16"), b"\xef\xbb\xbf" + files[name], files[name].replace(b"\n", b"\r\n"), files[name] + b"\xff"]
    )


def card_replaced(rng, files):
    """Front matter and cards of every odd kind."""
    body = rng.choice(
        [
            b"---\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n---\n",
            b"---\n!!python/object/apply:os.system ['touch canary']\n---\n",
            b"---\n" + b"[" * 5_000 + b"\n---\n",
            b"---\ntags: {a: b}\nlicense: [1, 2]\n---\n",
            b"---\nbase_model: 2024-13-45\ndescription: .nan\n---\n",
            b"---\nlicense: 0x" + b"f" * 30_000 + b"\n---\n",
            b"---\n? [a, b]\n: c\n---\n",
            b"---\n" + b"a: b\n" * 5_000,
            rng.randbytes(200),
        ]
    )
    files[rng.choice(["README.md", "loraweave.json"])] = body


def index_changed(rng, files):
    name = "adapter_model.safetensors.index.json"
    shard = rng.choice(SHARDS)
    table = json.loads(files[name])["weight_map"] if _is_index(files.get(name)) else {}
    table = {key: shard if rng.random() < 0.5 else value for key, value in table.items()} or {"a": shard}
    files[name] = json.dumps({"weight_map": rng.choice([table, table, table, [], None, "x", {}])}).encode()
    if rng.random() < 0.5:
        files.pop("adapter_model.safetensors", None)


def file_lost(rng, files):
    files.pop(rng.choice(sorted(files)))


def stand_in(rng, files):
    """Something else in place of a file: a git-LFS pointer, a pickle, nothing, or the bytes of another file."""
    name = rng.choice(sorted(files))
    files[name] = rng.choice(
        [LFS, LFS[:50], pickle.dumps(Canary()), b"", b"PK\3\4", b"<html>", files[rng.choice(sorted(files))]]
    )


def pickled(rng, files):
    files.pop("adapter_model.safetensors", None)
    files["adapter_model.bin"] = rng.choice([pickle.dumps(Canary()), LFS, b"", b"\x80\x04" + rng.randbytes(60)])


def archive_changed(rng, files):
    """An archive of torch.save whose pickle, data or entries are spoiled."""
    with zipfile.ZipFile(io.BytesIO(files["adapter_model.bin"])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(entries))
    inner = next(entry for entry in entries if entry.endswith(".pkl"))
    kind = rng.choice(["flip", "flip", "cut", "canary", "lose", "rename", "deflate", "splice"])
    if kind == "flip":
        flipped(rng, part := {name: entries[rng.choice([name, inner])]})
        entries[name] = part[name]
    elif kind == "cut":
        cut_off(rng, entries)
    elif kind == "canary":
        entries[inner] = pickle.dumps(Canary(), protocol=2)
    elif kind == "lose":
        entries.pop(name)
    elif kind == "rename":
        entries[rng.choice(["../x", "/x", "", "a" * 300, "archive/data/99"])] = entries.pop(name)
    elif kind == "splice":
        spliced(rng, entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if kind == "deflate" else zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    files["adapter_model.bin"] = file.getvalue()


def special(rng, files):
    name = rng.choice(sorted(files))
    links = [Special("link", target) for target in ("/etc/passwd", "nowhere", name)]
    files[name] = rng.choice([*links, Special("pipe"), Special("folder")])


def _odd_json(rng):
    depth = rng.choice([10, 900, 5_000, 60_000])
    return rng.choice(
        [
            b"[" * depth, b'{"a":' * depth, b'{"a":' + b"[" * depth + b"]" * depth + b"}", b"[]", b"7", b'"x"', b"null", b"",
            b"{", b"{}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5_000 + b"}",
            b'{"a": -' + b"9" * 5_000 + b"}", b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": 1, "a": 1}', b"{'a': 1}",
            b"{" + b" " * 70_000,
            b'{"' + b"k" * 200_000 + b'": 1}', b"{" + b",".join(b'"%d":{}' % at for at in range(2_000)) + b"}",
        ]
    )  # fmt: skip


def _opened(rng, files):
    name = weights(rng, files)
    header, data = folders.unpacked(files[name])
    return name, json.loads(header), data


def _close(files, name, table, data):
    files[name] = folders.packed(json.dumps(table).encode(), data)


def _is_index(raw):
    return raw is not None and raw.startswith(b"{") and b'"weight_map": {' in raw


MUTATIONS = [
    cut_off, flipped, flipped, spliced, extended, header_length, entry_changed, entry_changed, entry_changed, entries_moved,
    key_changed, key_twice, metadata_changed, header_replaced, data_changed, field_changed, field_changed, field_changed,
    type_changed, json_replaced, encoded_otherwise, card_replaced, index_changed, file_lost, stand_in, pickled, special,
    archive_changed, archive_changed,
]  # fmt: skip


# what a mutation runs into in a file that was spoiled before
UNFIT = (LookupError, ValueError, TypeError, AttributeError, RecursionError, StopIteration, struct.error, zipfile.BadZipFile)


def spoil(rng, files):
    """The names of one to three mutations, which were made in `files`; a mutation that does not fit any more is left out."""
    made = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        # a pattern costs a process of its own, so it comes rarely
        mutation = pattern_changed if rng.random() < 0.002 else rng.choice(MUTATIONS)
        try:
            mutation(rng, files)
        except UNFIT:
            continue
        made.append(mutation.__name__)
    return made
