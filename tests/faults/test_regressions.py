"""What the fuzz found once, each as the smallest folder that showed it."""

import io
import json
import tracemalloc
import zipfile

import pytest

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def sound(monkeypatch, request):
    """The sound folders of the fuzz, as name -> files."""
    monkeypatch.syspath_prepend(request.path.parent)
    import folders

    return folders.folders()


@pytest.fixture
def put(tmp_path):
    def write(files):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write


def index(shard):
    return json.dumps({"weight_map": {"a": shard}}).encode()


def test_a_link_to_itself_is_refused_by_name(sound, put):
    folder = put({WEIGHTS: sound["plain"][WEIGHTS]})
    (folder / CONFIG).symlink_to(CONFIG)
    with pytest.raises(AdapterCorrupt, match=r"adapter_config.json is a link that leads to itself"):
        Adapter.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"])
def test_an_index_that_names_a_file_that_cannot_be_is_refused_by_name(sound, put, shard):
    folder = put({CONFIG: sound["plain"][CONFIG], INDEX: index(shard)})
    with pytest.raises(AdapterCorrupt, match=r"names .*not a safetensors file|cannot open"):
        Adapter.from_pretrained(folder)


def test_a_small_index_takes_no_more_memory_than_it_needs(sound, put):
    folder = put({CONFIG: sound["plain"][CONFIG], INDEX: index("missing.safetensors")})
    tracemalloc.start()
    try:
        with pytest.raises(AdapterCorrupt):
            Adapter.from_pretrained(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_metadata_of_a_million_entries_is_refused_before_it_is_parsed(sound, put):
    import folders

    entries = b",".join(b'"%d":""' % at for at in range(1_000_000))
    folder = put({CONFIG: sound["plain"][CONFIG], WEIGHTS: folders.packed(b'{"__metadata__":{' + entries + b"}}", b"")})
    with pytest.raises(AdapterCorrupt, match=r"its header has 1000001 parts and describes 0 tensors"):
        Adapter.from_pretrained(folder)


def test_more_regular_expressions_than_can_be_compiled_in_a_second_are_refused(sound, put):
    import folders

    patterns = {f"l[{at}]": 2 for at in range(10_001)}
    folder = put({**sound["plain"], CONFIG: folders.config(rank_pattern=patterns)})
    with pytest.raises(AdapterUnsupported, match="10001 of 10001 patterns are regular expressions, above 10000"):
        Adapter.from_pretrained(folder)


def test_a_hundred_thousand_layer_names_as_patterns_keep_their_meaning(sound, put):
    import folders

    patterns = {f"other.layer{at}": 3 for at in range(100_000)} | {"layers.0.self_attn.q_proj": 2}
    folder = put({**sound["plain"], CONFIG: folders.config(alpha_pattern=patterns)})
    adapter = Adapter.from_pretrained(folder)
    plain = Adapter.from_pretrained(put(sound["plain"]))
    # alpha 2 in place of 4
    first, second = adapter.layers
    assert (2 * adapter.delta(first)).equal(plain.delta(first))
    assert adapter.delta(second).equal(plain.delta(second))


def test_a_small_file_that_stands_for_a_matrix_beyond_memory_is_refused_by_name(sound, put, monkeypatch):
    from loraweave.extensions.adapter_types.formats.lokr import lokr

    def update(layer):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12800000000 bytes.")

    monkeypatch.setattr(lokr, "update", update)
    with pytest.raises(AdapterUnsupported, match=r"layer 'layers.0.q_proj': its LOKR form .*more memory"):
        Adapter.from_pretrained(put(sound["lokr"]))


def test_a_whole_number_that_no_float_can_hold_is_refused_by_name(sound, put):
    table = json.loads(sound["lokr"][CONFIG])
    folder = put({**sound["lokr"], CONFIG: json.dumps({**table, "alpha": 10**400}).encode()})
    with pytest.raises(AdapterCorrupt, match=r"alpha is 1000\d+\.\.\., not a finite number"):
        Adapter.from_pretrained(folder)


def test_an_archive_of_torch_whose_entry_claims_gigabytes_is_refused_without_making_room(sound, put):
    raw = bytearray(sound["pickle"]["adapter_model.bin"])
    # the first entry of the directory at the end, whose second size is at its byte 20
    place = raw.index(b"PK\1\2") + 20
    raw[place : place + 4] = (3_000_000_000).to_bytes(4, "little")
    folder = put({**sound["pickle"], "adapter_model.bin": bytes(raw)})
    with pytest.raises(AdapterCorrupt, match=r"data.pkl' has \d+ bytes, but 3000000000 in the archive"):
        Adapter.from_pretrained(folder, allow_pickle=True)


def test_the_message_on_a_damaged_archive_does_not_pour_out_its_bytes(sound, put):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("adapter_config.json", sound["plain"][CONFIG])
        archive.writestr("padding", b"\xff" * 60_000)
    raw = bytearray(file.getvalue())
    # the length of the first name, in the header before it
    raw[26:28] = (50_000).to_bytes(2, "little")
    folder = put({"case.zip": bytes(raw)})
    with pytest.raises(AdapterCorrupt, match=r"case.zip is damaged") as caught:
        Adapter.from_pretrained(folder / "case.zip")
    assert len(str(caught.value)) < 1_000
