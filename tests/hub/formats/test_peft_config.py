"""Every field of PEFT's config is judged, and its pattern rule is followed exactly."""

import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from loraweave.hub.formats._config import resolve
from loraweave.hub.formats._peft_config import BENIGN, HANDLED, REFUSED, parse_lora


def test_every_field_of_the_installed_peft_is_in_exactly_one_table():
    fields = [field.name for field in dataclasses.fields(LoraConfig)]
    assert [name for name in fields if sum(name in table for table in (HANDLED, BENIGN, REFUSED)) != 1] == []


def test_default_config_of_the_installed_peft_is_accepted(tmp_path):
    config = parse_lora(
        LoraConfig(target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"], "peft_type": "LORA"}, tmp_path
    )
    assert (config.rank, config.alpha) == (8, 8.0)


def test_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank(tmp_path):
    config = parse_lora({"peft_type": "LORA", "r": 8, "lora_alpha": 3, "use_rslora": True}, tmp_path)
    assert config.scales({"x": 8})["x"] == 3 / math.sqrt(8)


segments = st.sampled_from(["model", "layers", "0", "1", "10", "q_proj", "k_proj", "qXproj", "mlp"])
names = st.lists(segments, min_size=1, max_size=4).map(".".join)
keys = st.one_of(
    names,
    names.map("^{}".format),
    names.map(lambda name: name.replace(".", r"\.")),
    st.sampled_from(
        [r".*\.[01]\..*", r"(q|k)_proj", r"\d+.q_proj", "q_proj|mlp", "[qk]_proj", "q.proj", r"layers\.\d\.mlp"]
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    patterns=st.dictionaries(keys, st.integers(1, 9), max_size=5),
    layers=st.lists(names, min_size=1, max_size=5, unique=True),
)
def test_patterns_resolve_as_in_peft(patterns, layers):
    expected = {layer: patterns.get(get_pattern_key(patterns.keys(), layer), 77) for layer in layers}
    assert resolve(patterns, layers, 77)[0] == expected
