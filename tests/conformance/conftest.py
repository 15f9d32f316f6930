"""A hub on every pair of a catalogue and a place for blobs."""

import pytest
from installed import require_entry
from store_places import STORES, new_place, opened


@pytest.fixture(scope="module")
def share():
    require_entry("blobs", "fsspec")
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Share(MemoryFileSystem):
        protocol = "share"

    fsspec.register_implementation("share", Share, clobber=True)


@pytest.fixture(params=STORES)
def place(request, tmp_path):
    """Where the hub of a test is: the arguments of `Hub`."""
    return new_place(request, tmp_path, request.param)


@pytest.fixture
def hub(place):
    with opened(place) as hub:
        yield hub


@pytest.fixture
def model(make_model):
    """A llama of the test's own: properties are gradients, too."""
    return make_model("llama")
