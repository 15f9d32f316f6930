"""The code of the page on dense prediction runs, and the page names what is there."""

from __future__ import annotations


def test_the_code_of_the_page_trains_two_tasks(run_page):
    names = run_page("docs/dense_prediction.md")
    assert names["depth"].shape == (4, 8, 8)
    experts = names["model"].expert_parameters()
    assert all(bool(value.any()) for name, value in experts.items() if name.endswith("b_SO"))
    learned = {name for name in names["model"].learning() if name.startswith("base_model.")}
    assert learned == {f"base_model.decode_head.{name}" for name, _ in names["base"].decode_head.named_parameters()}
