"""The code of the page on dense prediction runs, and the page names what is there."""

from __future__ import annotations


def test_the_code_of_the_page_trains_two_tasks(run_page):
    names = run_page("docs/dense_prediction.md")
    assert names["depth"].shape == (4, 8, 8)
    experts = names["model"].expert_parameters()
    assert all(value.grad is not None for name, value in experts.items() if name.endswith("b_SO"))
    assert names["base"].decode_head.classifier.weight.grad is not None
    assert names["base"].segformer.stages[0].blocks[0].mlp.fc1.weight.grad is None
