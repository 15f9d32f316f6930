"""The page on more merge methods: its code runs."""


def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/methods.md")
    assert names["turned"].rank == 8
    layer = "model.layers.0.self_attn.q_proj"
    expected = names["passive"].delta(layer) - 0.3 * names["negation"].delta(layer)
    assert (names["less"].delta(layer) - expected).norm() <= 1e-6 * expected.norm()
