"""The code of the page of fused experts."""


def test_the_code_of_the_page_runs(run_page):
    run_page("docs/extensions/fused_experts.md")
