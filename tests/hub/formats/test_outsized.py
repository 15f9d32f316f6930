"""Files that ask for more than they hold: reading, examining and cutting take memory in proportion to the file."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from peft_models import lora, put
from tiny_models import random_factors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraweave.common import process
from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter, cosine
from loraweave.hub.formats import _files, _safetensors
from loraweave.hub.formats._contents import Bound, cut_update
from loraweave.hub.hub import Hub
from loraweave.lowrank import algebra
from loraweave.types import Factors

RANK = 30_000


class Largest(TorchDispatchMode):
    """Knows the number of entries of the largest tensor that torch made while it was entered."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


@pytest.fixture
def tall(tmp_path):
    """A file of 0.96 MB: rank 30,000 on a layer of four inputs and outputs."""
    made = torch.Generator().manual_seed(0)
    held = lora("up", a=torch.randn(RANK, 4, generator=made), b=torch.randn(4, RANK, generator=made))
    return put(tmp_path / "tall", held, r=RANK, lora_alpha=RANK)


def hollow(folder, num_bytes):
    """An adapter whose two tensors the header has in full, and the disk not at all."""
    half = num_bytes // 2
    first, second = lora("up")
    put(folder, lora("up"), r=1, lora_alpha=1)
    entries = {
        first: {"dtype": "F32", "shape": [1, half // 4], "data_offsets": [0, half]},
        second: {"dtype": "F32", "shape": [half // 4, 1], "data_offsets": [half, 2 * half]},
    }
    header = json.dumps(entries).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * half)
    return folder


def test_an_update_of_a_rank_far_above_its_sides_is_read_added_and_compared_without_a_square_of_the_rank(tall, tmp_path):
    figures_of = pytest.importorskip("loraweave.extensions.trust.figures").figures_of
    with Largest() as torch_made:
        adapter = Adapter.from_pretrained(tall)
        with Hub(tmp_path / "hub") as hub:
            hub.add(tall, name="a")
            hub.add(adapter, name="b")
        figures = figures_of(adapter, "org/base")
        score, _ = cosine(adapter, adapter)
        # numpy computes this, whose memory tracemalloc sees
        tracemalloc.start()
        _, error = algebra.compress(adapter.layers["up"], 2)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # the two random matrices that every sketch is made with
    assert torch_made.entries <= 128 * 4096
    assert peak < 16 * 2**20
    sigma = np.linalg.svd(adapter.layers["up"].b_OR.double().numpy() @ adapter.layers["up"].a_RI.double().numpy())[1]
    energy = float(np.square(sigma).sum())
    assert algebra.norm(adapter.layers["up"]) == pytest.approx(math.sqrt(energy))
    assert score == pytest.approx(1.0)
    assert figures.log_norm_L[0] == pytest.approx(0.5 * math.log(energy))
    share = sigma[0] ** 2 / energy
    assert figures.dominance_L[0] == pytest.approx(math.log(share / (1 - share)))
    assert error == pytest.approx(math.sqrt(np.square(sigma[2:]).sum() / energy))


def test_the_inner_product_is_that_of_the_dense_updates_whichever_rank_is_large():
    made = torch.Generator().manual_seed(1)
    low, high = (random_factors(made, rank, 3, 5) for rank in (2, 700))
    for left, right in ((low, high), (high, low), (high, high)):
        expected = float((left.b_OR.double() @ left.a_RI.double() * (right.b_OR.double() @ right.a_RI.double())).sum())
        assert algebra.inner(left, right) == pytest.approx(expected)


def test_refusing_a_rank_names_the_one_that_is_enough_without_the_dense_update():
    sides, sigma = 100_000, torch.tensor([4.0, 2.0, 1.0])
    a_RI, b_OR = torch.zeros(3, sides), torch.zeros(sides, 3)
    a_RI[range(3), range(3)], b_OR[range(3), range(3)] = sigma, 1.0
    # without the third singular value the error is 1 / sqrt(21) = 0.218, without the second too 0.488
    with Largest() as made, pytest.raises(AdapterUnsupported, match="rank 2 would stay within it"):
        cut_update(Factors(a_RI, b_OR), Bound(1, 0.3), "here")
    assert made.entries <= 3 * sides


def test_a_file_of_holes_is_refused_before_it_is_read(tmp_path):
    beyond, empty = hollow(tmp_path / "64", 64 * 2**30), hollow(tmp_path / "8", 8 * 2**30)
    with Largest() as made:
        with pytest.raises(AdapterUnsupported, match=r"68,719,4.* above the limit of 34,359,738,368"):
            Adapter.from_pretrained(beyond)
        with pytest.raises(AdapterCorrupt, match=r"the disk holds only .* holes"):
            Adapter.from_pretrained(empty)
    assert made.entries == 0


def test_where_the_file_system_knows_no_holes_a_file_is_whole(tmp_path, monkeypatch):
    folder = hollow(tmp_path / "1", 2**10)
    monkeypatch.setattr(_files, "HOLES_FROM_BYTES", 1)
    monkeypatch.delattr("os.SEEK_DATA")
    with pytest.raises(AdapterUnsupported, match="without effect"):
        Adapter.from_pretrained(folder)


def test_tensors_that_need_more_memory_than_is_free_are_refused_with_both_figures(tall, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemAvailable:   1000 kB\n")
    monkeypatch.setattr(process, "MEMINFO", tmp_path / "meminfo")
    # an adapter of ordinary size is read without asking
    Adapter.from_pretrained(tall)
    monkeypatch.setattr(_safetensors, "ALWAYS_FREE_BYTES", 1_919_999)
    with pytest.raises(AdapterUnsupported, match="need 1,920,000 bytes of memory to be read, but 1,024,000 are free"):
        Adapter.from_pretrained(tall)
