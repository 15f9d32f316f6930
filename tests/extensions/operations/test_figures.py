"""The figures of a server: histograms of its answers' parts, the process's own, and labels of few values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from served_rows import heard_rows, wait_for

from loraweave.extensions.operations import PrometheusMetrics
from loraweave.serving.limits import Limits
from loraweave.serving.scheduler import Scheduler


def value(text, name):
    return float(re.search(rf"^loraweave_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.parametrize("count", [1, 5])
def test_each_part_of_an_answer_has_a_histogram_of_its_own(make_model, make_adapters, tokenizer, count):
    model = make_model("llama", dtype=torch.float64)
    metrics = PrometheusMetrics()
    scheduler = Scheduler(model, tokenizer, Limits(), metrics)
    rows = heard_rows(tokenizer, make_adapters(model, "llama"), max_tokens=count)
    scheduler.start()
    try:
        scheduler.submit([each.row for each in rows])
        wait_for(rows)
    finally:
        scheduler.close()
    text = metrics.text().decode()
    answered = len(rows)
    longer = sum(len(each.row.tokens) > 1 for each in rows)
    parts = {"queue": answered, "first_token": answered, "token": longer, "answer": answered}
    assert {name: value(text, f"{name}_seconds_count") for name in parts} == parts
    sums = {name: value(text, f"{name}_seconds_sum") for name in parts}
    assert 0 <= sums["queue"] <= sums["first_token"] <= sums["answer"]
    for each in rows:
        assert each.row.made <= each.row.begun <= each.row.first <= each.row.last
    bounds = [float(found) for found in re.findall(r'answer_seconds_bucket{le="([^"]+)"}', text)]
    assert sorted(bounds)[-2] > Limits().seconds
    assert math.isinf(bounds[-1])
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE)


def test_a_row_without_a_token_is_in_no_histogram(make_adapters, make_model, tokenizer):
    metrics = PrometheusMetrics()
    adapters = make_adapters(make_model("llama"), "llama")
    metrics.ended(heard_rows(tokenizer, adapters)[0].row)
    assert value(metrics.text().decode(), "answer_seconds_count") == 0


def test_the_board_names_figures_that_a_server_has_and_shows_each_histogram():
    board = json.loads((Path(__file__).parents[3] / "deploy" / "grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    text = PrometheusMetrics().text().decode()
    known = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    known |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\w+) histogram", text, re.MULTILINE)}
    named = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            found = set(re.findall(r"\b(?:loraweave|process)_\w+", target["expr"]))
            assert found
            named |= found
    assert named <= known, named - known
    assert {f"loraweave_{part}_seconds_bucket" for part in ("queue", "first_token", "token", "answer")} <= named
