"""adapter_model.bin: read on consent alone, by the safe loader, and only where it holds plain tensors of the file's size."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from peft_models import LORA, lora
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub

ran = []


class Hostile:
    """Would write to `ran` when it is built."""

    def __reduce__(self):
        return ran.append, ("code of the file was run",)


def tensors(dtype=torch.float32):
    return {name: tensor.to(dtype) for name, tensor in lora().items()}


def put(folder, table, **options):
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    torch.save(table, folder / "adapter_model.bin", **options)
    return folder


def rewritten(folder, change, *, compression=zipfile.ZIP_STORED):
    """The archive with every entry's bytes passed through `change(name, bytes)`."""
    path = folder / "adapter_model.bin"
    with zipfile.ZipFile(path) as old:
        entries = [(name, change(name, old.read(name))) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, raw in entries:
            new.writestr(name, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_with_consent_a_pickle_gives_what_the_same_safetensors_give(tmp_path, dtype):
    given = tensors(dtype)
    a, b = given.values()
    adapter = Adapter.from_pretrained(put(tmp_path, given), allow_pickle=True)
    factors = adapter.layers["model.layers.0.self_attn.q_proj"]
    assert torch.equal(factors.a_RI, a.float())
    assert torch.equal(factors.b_OR, (b.double() * 2).float())
    assert adapter.card["stored_dtype"] == str(dtype).removeprefix("torch.")


def test_the_hub_refuses_a_pickle_without_consent_and_stores_it_with(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    put(folder, OrderedDict((key, torch.nn.Parameter(value)) for key, value in tensors().items()))
    with Hub(tmp_path / "hub") as hub:
        with pytest.raises(AdapterUnsupported, match=r"allow_pickle=True"):
            hub.add(folder)
        assert len(hub) == 0
        assert hub.add(folder, allow_pickle=True).rank == 2


def test_safetensors_beside_a_pickle_are_read_and_the_pickle_is_not_opened(tmp_path):
    put(tmp_path, tensors())
    (tmp_path / "adapter_model.bin").write_bytes(b"no archive")
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    assert Adapter.from_pretrained(tmp_path, allow_pickle=True).rank == 2


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (Hostile(), r"__builtin__\.getattr"),
        (io.BytesIO(b"x"), r"_io\.BytesIO"),
        (bytearray(8), r"__builtin__\.bytearray"),
        (torch.float32, r"torch\.float32"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (torch.eye(3).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
        (torch.empty(10**9, device="meta"), r"torch\._utils\._rebuild_meta_tensor_no_storage"),
    ],
)
def test_a_pickle_that_wants_another_class_is_refused_by_its_name_and_nothing_runs(tmp_path, extra, named):
    put(tmp_path, {**tensors(), "extra": extra})
    with pytest.raises(AdapterUnsupported, match=f"wants {named}"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)
    assert ran == []


def test_a_class_named_by_another_opcode_is_refused(tmp_path):
    put(tmp_path, tensors())
    hostile = pickle.dumps(Hostile(), protocol=4)
    rewritten(tmp_path, lambda name, raw: hostile if name.endswith("data.pkl") else raw)
    with pytest.raises(AdapterUnsupported, match="STACK_GLOBAL"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)
    assert ran == []


@pytest.mark.parametrize("extra", [3, "text", [1, 2], None, {"model": torch.ones(2)}])
def test_a_table_of_something_else_than_tensors_is_refused(tmp_path, extra):
    put(tmp_path, {**tensors(), "extra": extra})
    with pytest.raises(AdapterUnsupported, match=r"'extra', not a plain tensor"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)


def test_a_file_that_is_not_a_table_is_refused(tmp_path):
    with pytest.raises(AdapterUnsupported, match="holds a Tensor, not a table"):
        Adapter.from_pretrained(put(tmp_path, torch.ones(3)), allow_pickle=True)


def test_strides_of_zero_cannot_make_a_tensor_above_the_file(tmp_path):
    huge = torch.ones(1).expand(10**12)
    with pytest.raises(AdapterCorrupt, match=r"1000000000000.*needs 4000000000000 bytes"):
        Adapter.from_pretrained(put(tmp_path, {**tensors(), "huge": huge}), allow_pickle=True)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    put(tmp_path, {**tensors(), "zeros": torch.zeros(10**6)})
    rewritten(tmp_path, lambda name, raw: raw, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "adapter_model.bin").stat().st_size < 10**5
    with pytest.raises(AdapterCorrupt, match="compressed"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_a_named_error(tmp_path, part):
    put(tmp_path, tensors())
    path = tmp_path / "adapter_model.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(AdapterCorrupt, match=r"adapter_model\.bin is not an intact archive"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)


def test_the_form_of_old_pytorch_is_refused_with_the_way_out(tmp_path):
    put(tmp_path, tensors(), _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterCorrupt, match=r"before 1\.6.*save them again"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)


def test_a_storage_that_claims_more_than_its_record_is_a_named_error(tmp_path):
    put(tmp_path, tensors())
    # the first storage has 10 numbers
    rewritten(tmp_path, lambda name, raw: raw.replace(b"K\x0at", b"M\xff\x7ft", 1) if name.endswith("data.pkl") else raw)
    with pytest.raises(AdapterCorrupt, match="safe loader"):
        Adapter.from_pretrained(tmp_path, allow_pickle=True)


def test_every_flipped_byte_of_the_pickle_is_read_or_named(tmp_path):
    put(tmp_path, tensors())
    original = (tmp_path / "adapter_model.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "adapter_model.bin") as archive:
        size = archive.getinfo("adapter_model/data.pkl").file_size
    named = 0
    for place in range(0, size, 3):
        (tmp_path / "adapter_model.bin").write_bytes(original)

        def flip(name, raw, place=place):
            return raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :] if name.endswith("data.pkl") else raw

        rewritten(tmp_path, flip)
        try:
            Adapter.from_pretrained(tmp_path, allow_pickle=True)
        except (AdapterCorrupt, AdapterUnsupported):
            named += 1
    assert named > size // 6


def test_a_git_lfs_pointer_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (tmp_path / "adapter_model.bin").write_text(pointer)
    for consent in (False, True):
        with pytest.raises(AdapterCorrupt, match="git-LFS pointer"):
            Adapter.from_pretrained(tmp_path, allow_pickle=consent)
