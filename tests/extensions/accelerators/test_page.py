"""The code of the page of accelerators."""


def test_the_code_of_the_page_runs(run_page):
    run_page("docs/extensions/accelerators.md")
