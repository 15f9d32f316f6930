"""The page on other programs: its code runs."""


def test_the_code_of_the_page_runs(run_page):
    assert run_page("docs/extensions/engines.md")["report"].rank == 4
