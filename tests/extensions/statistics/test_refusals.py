"""Where statistics are missing, or another adapter's, each entrance says so before anything runs."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

import loraweave as lw
from loraweave.errors import CompositionError, FormulaError, WeightingError
from loraweave.extensions.statistics import Statistics, collect_statistics


def test_statistics_of_another_adapter_are_not_written_into_a_model(engine):
    adapters = engine.pool.adapters
    of_a = Statistics(adapters["a"].hash, {})
    with pytest.raises(WeightingError, match=r"given for 'b' \(hash .*with an adapter of hash"):
        engine.fused({"b": 1.0}, method="regmean", statistics={"b": of_a}).__enter__()
    with pytest.raises(WeightingError, match=r"given for 'b' \(hash .*with an adapter of hash"):
        lw.merge([adapters["b"]], method="regmean", statistics=[of_a])


def test_a_search_has_no_statistics_to_merge_by(pool):
    with pytest.raises(WeightingError, match="statistics of each adapter"):
        lw.compose(None, None, pool, lw.Task([("a", "ab")]), method="lorahub", merge_method="fisher")


def test_a_formula_has_no_statistics_to_merge_by():
    with pytest.raises(FormulaError) as caught:
        lw.parse("fisher(a, b)")
    said, shown, caret = str(caught.value).split("\n")
    assert "'fisher' weighs by data" in said
    assert (shown, caret) == ("  fisher(a, b)", "  ^~~~~~")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pefts_adapters_in_a_base_are_refused_with_the_way_out(make_model, tokenizer, pool):
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CompositionError, match=r"PeftModel\w* of peft, .* pass model\.unload\(\)"):
        collect_statistics(model, tokenizer, pool["a"], ["ab"])
    with pytest.raises(CompositionError, match=r"'model\.layers\.0\.self_attn\.q_proj' is peft's Linear.* unload\(\)"):
        collect_statistics(model.get_base_model(), tokenizer, pool["a"], ["ab"])
