"""Folders of ternary adapters: bit-exact, small, whole or not at all, and refused when damaged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.extensions.adapter_types.formats.compeft import Compeft
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import Contents
from loraweave.types import Factors, Fingerprint


def ternary(*shape, c=0.37, density=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(*shape, generator=generator).sign()
    return torch.where(torch.rand(*shape, generator=generator) < density, signs * c, 0.0)


def contents(**changes):
    layers = {
        "a": Factors(ternary(3, 20), ternary(9, 3, seed=1), bias_O=torch.randn(9)),
        "b": Factors(ternary(2, 18, c=2.0, seed=2), ternary(9, 2, c=1e-3, seed=3), kind="conv", kernel=(3, 3)),
        "odd/.. \nname": Factors(ternary(1, 5, density=1.0), ternary(4, 1, density=1.0), kind="embedding"),
        "empty": Factors(torch.zeros(0, 5), torch.zeros(4, 0), base_bias_O=torch.randn(4)),
    }
    fields = {
        "card": {"name": "n", "tags": ("x",)},
        "fingerprint": Fingerprint("abc", (0.5,)),
        "heads": {"h.w": torch.randn(2, 3)},
    }
    return Contents("base", **{"layers": layers, **fields, **changes})


def hash_of(found):
    return Adapter("x", "base", found.layers, heads=found.heads).hash


def test_everything_comes_back_bit_for_bit(tmp_path):
    given = contents()
    found = Compeft.read(Compeft.write(given, tmp_path / "deep" / "x"))
    assert hash_of(found) == hash_of(given)
    assert found.layers.keys() == given.layers.keys()
    for layer, expected in given.layers.items():
        assert (found.layers[layer].kind, found.layers[layer].kernel) == (expected.kind, expected.kernel)
        assert found.layers[layer].tensors().keys() == expected.tensors().keys()
    assert (found.base_model, found.fingerprint) == ("base", given.fingerprint)
    assert found.card == {"name": "n", "tags": ["x"]}
    assert sorted(path.name for path in (tmp_path / "deep" / "x").iterdir()) == ["compeft.json", "compeft.safetensors"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x"]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.382, 0.5])
def test_the_weights_file_is_within_five_percent_of_the_entropy_bound(tmp_path, density):
    layers = {
        f"model.layers.{n}.q_proj": Factors(
            ternary(8, 576, density=density, seed=n), ternary(576, 8, density=density, seed=100 + n)
        )
        for n in range(20)
    }
    folder = Compeft.write(Contents("base", layers), tmp_path / "x")
    flat = torch.cat([t.flatten() for f in layers.values() for t in (f.a_RI, f.b_OR)])
    k = float((flat != 0).double().mean())
    bound = flat.numel() * (-k * math.log2(k) - (1 - k) * math.log2(1 - k) + k) + 16
    assert 8 * (folder / "compeft.safetensors").stat().st_size < 1.05 * bound


def test_factors_that_are_not_ternary_are_refused_with_the_way_out(tmp_path):
    given = contents(layers={"q": Factors(ternary(3, 20), torch.randn(9, 3))})
    with pytest.raises(AdapterUnsupported, match=r"b_OR of layer 'q'.*compeft\(adapter\) of .*methods"):
        Compeft.write(given, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def damaged(folder, change):
    path = folder / "compeft.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=2),
        lambda d: d.pop("layers"),
        lambda d: d.pop("stored_as"),
        lambda d: d.update(stored_as="zip"),
        lambda d: d.update(base_model=7),
        lambda d: d.update(card=[]),
        lambda d: d.update(fingerprint="x"),
        lambda d: d.update(heads=["h.w", "h.v"]),
        lambda d: d["layers"].append(d["layers"][0]),
        lambda d: d["layers"][0].update(shape=[9, 3]),
        lambda d: d["layers"][0].update(shape=[9, 3, -1]),
        lambda d: d["layers"][0].update(shape=[9, 3, 2**30]),
        lambda d: d["layers"][0].update(shape=[8, 3, 21]),
        lambda d: d["layers"][0].update(shape=[10, 3, 20]),
        lambda d: d["layers"][0].update(kind="magic"),
        lambda d: d["layers"][0].update(kernel=[-1]),
        lambda d: d["layers"][0].update(parts=["a_RI"]),
        lambda d: d["layers"][1].update(path=d["layers"][0]["path"]),
    ],
)
def test_a_damaged_description_is_refused_by_the_folder_s_name(tmp_path, change):
    folder = Compeft.write(contents(), tmp_path / "x")
    damaged(folder, change)
    with pytest.raises(AdapterCorrupt, match=str(folder)):
        Compeft.read(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("signs"),
        lambda t: t.update(signs=t["signs"][:-1].clone()),
        lambda t: t.update(signs=t["signs"].float()),
        lambda t: t.update(scales=torch.full_like(t["scales"], torch.nan)),
        lambda t: t.update({"head.0": torch.full((2, 3), torch.inf)}),
        lambda t: t.update(extra=torch.ones(1)),
        lambda t: t.update(scales=t["scales"].half()),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, change):
    folder = Compeft.write(contents(), tmp_path / "x")
    tensors = load_file(folder / "compeft.safetensors")
    change(tensors)
    save_file(tensors, folder / "compeft.safetensors")
    with pytest.raises(AdapterCorrupt):
        Compeft.read(folder)


@pytest.mark.parametrize("name", ["compeft.json", "compeft.safetensors"])
def test_a_folder_with_half_of_the_files_is_recognised_and_refused(tmp_path, name):
    folder = Compeft.write(contents(), tmp_path / "x")
    (folder / name).unlink()
    assert Compeft.recognises(folder)
    with pytest.raises(AdapterCorrupt, match=f"cannot open {name}"):
        Compeft.read(folder)
    assert not Compeft.recognises(tmp_path)
