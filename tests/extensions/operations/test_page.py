"""The page of a server's budgets and figures."""


def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/operations.md")
    assert (names["status"], "loraweave_new_tokens_total 3.0" in names["figures"]) == (200, True)
