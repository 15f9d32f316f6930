"""The page of the extension."""


def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/expert_training.md")
    assert names["labels"].shape == (8,)
    assert len(names["experts"].training_report.losses) == 3
