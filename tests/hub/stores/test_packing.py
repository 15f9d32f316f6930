import pytest
import torch

from loraweave.hub.stores.blobs import pack, unpack

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
