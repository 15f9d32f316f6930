"""The page of a server's budgets and figures."""


def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/operations.md")
    # a step is counted after its tokens are told, a request before its answer
    counted = 'loraweave_requests_total{path="/v1/completions",status="200"} 1.0'
    assert (names["status"], counted in names["figures"]) == (200, True)
