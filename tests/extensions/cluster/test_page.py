"""The page on hubs elsewhere: its code prints what it says."""

import re


def test_the_code_of_the_page_prints_what_it_says(run_page, here, capsys):
    run_page("docs/extensions/cluster.md")
    assert re.fullmatch(r"Hub\('adapters'\)\n0\n", capsys.readouterr().out)
