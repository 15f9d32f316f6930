import hashlib
import json
import math
import os
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import random_factors

from loraweave.common import files
from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter
from loraweave.hub.stores.blobs import blob_bytes, content_hash, examine_blob, pack, read_blob, unpack
from loraweave.hub.stores.folder_blobs import STALE_TMP_S, FolderBlobs, blob_path, require_digest
from loraweave.types import Factors


def factors(seed, rank=3, outputs=5, inputs=7, *, vectors=(), **parts):
    draw = torch.Generator().manual_seed(seed)
    update = random_factors(draw, rank, outputs, inputs, **parts)
    return replace(update, **{name: torch.randn(outputs, generator=draw) for name in vectors})


LAYERS = {
    "model.layers.0.self_attn.q_proj": factors(0, vectors=("gain_O", "bias_O")),
    "odd/.. path\n0.a_RI": factors(1, rank=1, outputs=1, inputs=1),
    "wte": factors(2, kind="embedding", vectors=("magnitude_O",)),
    "conv": factors(3, inputs=18, kind="conv", kernel=(3, 3), vectors=("base_bias_O",)),
}


def write(folder, layers=LAYERS, **options):
    content = content_hash(layers, options.get("heads", {}))
    digest = FolderBlobs(folder).put(content, blob_bytes(layers, '{"name":"x"}', **options))
    return blob_path(folder, content), digest


def test_a_blob_gives_every_tensor_kind_and_path_back_bit_for_bit(tmp_path):
    path, _ = write(tmp_path)
    layers = read_blob(path, "x").layers
    assert set(layers) == set(LAYERS)
    for layer, expected in LAYERS.items():
        found = layers[layer]
        assert (found.kind, found.kernel) == (expected.kind, expected.kernel)
        assert found.tensors().keys() == expected.tensors().keys()
        assert all(torch.equal(found.tensors()[part], tensor) for part, tensor in expected.tensors().items())


def test_the_file_is_named_by_its_content_and_read_only(tmp_path):
    path, _ = write(tmp_path)
    name = Adapter("", "", LAYERS).hash
    assert path == tmp_path / "blobs" / name[:2] / f"{name}.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_the_digest_is_that_of_the_file(tmp_path):
    path, digest = write(tmp_path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert examine_blob(path, path.stem) == (digest, path.stat().st_size, {"name": "x"})


def test_safetensors_reads_the_file_without_us(tmp_path):
    path, _ = write(tmp_path, {"layer": LAYERS["wte"]})
    with safe_open(path, framework="pt") as file:
        places = json.loads(file.metadata()["loraweave"])["places"]
        offset, shape = next(place[1:] for place in places if place[0] == "0.b_OR")
        found = file.get_tensor("packed")[offset : offset + math.prod(shape)].view(shape)
        assert torch.equal(found, LAYERS["wte"].b_OR)


def test_float64_is_stored_as_fp32_under_the_hash_of_the_fp32_content(tmp_path):
    single = factors(4)
    double = Factors(single.a_RI.double(), single.b_OR.double())
    path, _ = write(tmp_path, {"layer": double})
    assert path.stem == content_hash({"layer": single})
    assert read_blob(path, "x").layers["layer"].a_RI.dtype == torch.float32


def test_layers_that_share_a_tensor_are_stored(tmp_path):
    one = factors(5)
    path, _ = write(tmp_path, {"first": one, "second": Factors(one.a_RI, factors(6).b_OR)})
    layers = read_blob(path, "x").layers
    assert torch.equal(layers["first"].a_RI, layers["second"].a_RI)


def test_what_is_mapped_survives_the_removal_of_the_file_and_writing_to_it_leaves_the_file_alone(tmp_path):
    path, digest = write(tmp_path)
    layers = read_blob(path, "x").layers
    layers["wte"].a_RI.add_(1.0)
    require_digest(path, digest, "x", trust_cache=False)
    path.unlink()
    assert torch.equal(layers["conv"].b_OR, LAYERS["conv"].b_OR)


@pytest.mark.parametrize("where", [0, 9, 60, -1])
def test_a_flipped_byte_anywhere_is_found_by_its_digest(tmp_path, where):
    path, digest = write(tmp_path)
    require_digest(path, digest, "adapter 'x'")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    os.chmod(path, 0o644)
    path.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    with pytest.raises(AdapterCorrupt, match=f"adapter 'x'.*{path.name}.*{found}, not {digest}"):
        require_digest(path, digest, "adapter 'x'")


@pytest.mark.parametrize("data", [b"", b"x" * 7, b"\xff" * 64, (2).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_blob_is_corrupt(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterCorrupt, match=r"adapter 'x'.*cannot be read"):
        read_blob(path, "adapter 'x'")


def test_a_link_in_place_of_a_blob_is_refused(tmp_path):
    path, digest = write(tmp_path)
    moved = path.rename(tmp_path / "elsewhere")
    path.symlink_to(moved)
    with pytest.raises(AdapterCorrupt, match="not a regular file"):
        require_digest(path, digest, "x")


def test_an_unchanged_file_is_hashed_once_per_process(tmp_path, monkeypatch):
    path, digest = write(tmp_path)
    require_digest(path, digest, "x")
    monkeypatch.setattr(files, "file_digest", lambda path: "never")
    require_digest(path, digest, "x")
    with pytest.raises(AdapterCorrupt, match="never"):
        require_digest(path, digest, "x", trust_cache=False)


def test_only_old_temporary_files_are_swept(tmp_path):
    (tmp_path / "tmp").mkdir()
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    old.write_bytes(b"12345")
    new.write_bytes(b"123")
    os.utime(old, (0, 0))
    assert FolderBlobs(tmp_path).sweep(STALE_TMP_S) == 5
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["new"]


HEADS = {"score.weight": torch.randn(3, 5), "odd/.. \nname": torch.ones(())}


def test_heads_come_back_bit_for_bit_and_are_a_part_of_the_content(tmp_path):
    content = content_hash(LAYERS, HEADS)
    assert content != content_hash(LAYERS)
    path, _ = write(tmp_path, heads=HEADS)
    blob = read_blob(path, "x")
    assert blob.heads.keys() == HEADS.keys()
    assert all(torch.equal(blob.heads[name], tensor) for name, tensor in HEADS.items())
    assert blob.content_hash() == content
    assert examine_blob(path, content)[1] == path.stat().st_size


def version_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["loraweave"])["version"]


def test_all_factors_are_one_tensor_of_the_file(tmp_path):
    path, _ = write(tmp_path)
    assert version_of(path) == 3
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["packed"]
        assert file.get_slice("packed").get_shape() == [
            sum(t.numel() for f in LAYERS.values() for t in f.tensors().values())
        ]


@pytest.mark.parametrize(("version", "heads"), [(1, {}), (2, HEADS)])
def test_blobs_of_older_programs_with_a_tensor_for_each_factor_are_read(tmp_path, version, heads):
    entries, tensors = [], {f"head.{number}": heads[name] for number, name in enumerate(sorted(heads))}
    for number, (layer, found) in enumerate(sorted(LAYERS.items())):
        entry = {"path": layer, "kind": found.kind, "kernel": list(found.kernel), "parts": list(found.tensors())}
        entries.append(entry)
        tensors |= {f"{number}.{part}": tensor for part, tensor in found.tensors().items()}
    header = {"version": version, "layers": entries, "origin": {}} | ({"heads": sorted(heads)} if heads else {})
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"loraweave": json.dumps(header)})
    assert read_blob(path, "x").content_hash() == content_hash(LAYERS, heads)


def test_a_table_of_places_that_does_not_fit_the_packed_tensor_is_corrupt(tmp_path):
    path, _ = write(tmp_path)
    with safe_open(path, framework="pt") as file:
        header, flat = json.loads(file.metadata()["loraweave"]), file.get_tensor("packed").clone()
    header["places"][0][1] += 1
    damaged = tmp_path / "x.safetensors"
    save_file({"packed": flat}, damaged, metadata={"loraweave": json.dumps(header)})
    with pytest.raises(AdapterCorrupt, match=r"adapter 'x': blob .*begins at 1, but the one before it ends at 0"):
        read_blob(damaged, "adapter 'x'")


TENSORS = {"a": torch.arange(6.0).view(2, 3), "none": torch.empty(0, 4), "scalar": torch.tensor(7.0), "b": torch.arange(3.0)}


def test_tensors_come_back_with_their_shapes_as_views_of_one():
    places, flat = pack(TENSORS)
    assert places == [("a", 0, [2, 3]), ("none", 6, [0, 4]), ("scalar", 6, []), ("b", 7, [3])]
    found = unpack(places, flat)
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert {tensor.untyped_storage().data_ptr() for tensor in found.values()} == {flat.untyped_storage().data_ptr()}


def test_what_is_packed_shares_nothing_with_what_was_given():
    one = torch.ones(3)
    places, flat = pack({"first": one, "second": one[:2], "third": one.view(3, 1).expand(3, 2)})
    one.zero_()
    assert flat.tolist() == [1.0] * 11
    assert unpack(places, flat)["third"].shape == (3, 2)


def test_other_dtypes_become_fp32():
    _, flat = pack({"double": torch.tensor([0.1], dtype=torch.float64), "half": torch.tensor([0.5], dtype=torch.bfloat16)})
    assert flat.dtype == torch.float32
    assert flat.tolist() == [torch.tensor(0.1).item(), 0.5]


def test_a_tensor_of_eight_axes_comes_back():
    tensor = torch.arange(6.0).view(1, 2, 1, 3, 1, 1, 1, 1)
    assert torch.equal(unpack(*pack({"a": tensor}))["a"], tensor)


def test_nothing_packs_to_an_empty_vector():
    assert unpack(*pack({})) == {}


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([["a", 0, [2]], ["b", 1, [2]]], "'b' begins at 1, but the one before it ends at 2"),
        ([["a", 0, [2]], ["b", 3, [1]]], "'b' begins at 3, but the one before it ends at 2"),
        ([["a", 0, [3]], ["b", 3, [2]]], "'b' ends at 5, but the packed tensor has 4"),
        ([["a", 0, [3]]], "end at 3, but the packed tensor has 4"),
        ([["a", 0, [2]], ["a", 2, [2]]], "a name twice"),
        ([["a", 0, [10**6, 10**6]]], "ends at 1000000000000"),
        ([["a", 0, [2**62]]], "not from 0 to 2"),
        ([["a", 0, [-1]]], "not from 0 to 2"),
        ([["a", 0, [2.0]]], "not from 0 to 2"),
        ([["a", False, [4]]], "not from 0 to 2"),
        ([["a", 0]], "not \\[name"),
        ([["a", 0, [1] * 9]], "at most 8 axes"),
        ([["a", 0, "4"]], "not \\[name"),
        ([[1, 0, [4]]], "not \\[name"),
        (["a04"], "not \\[name"),
        ({"a": [0, [4]]}, "is dict, not a list"),
    ],
)
def test_places_outside_overlapping_apart_or_no_numbers_are_refused(places, reason):
    with pytest.raises(ValueError, match=reason):
        unpack(places, torch.zeros(4))


@pytest.mark.parametrize("flat", [torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2), torch.zeros(())])
def test_a_packed_tensor_of_another_form_is_refused(flat):
    with pytest.raises(ValueError, match="not a vector of fp32"):
        unpack([["a", 0, [4]]], flat)
