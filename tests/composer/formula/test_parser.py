"""What a formula says: one value for all its spellings, one text for the value, and errors that show the place."""

import pytest

import loraweave as lw
from loraweave.composer.formula.nodes import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    Auto,
    Ensemble,
    Listed,
    Merge,
    Named,
    Routed,
    Stored,
    Sum,
)
from loraweave.composer.formula.parser import MAX_ADAPTERS
from loraweave.errors import FormulaError, InvalidName

A, B, C = Named("a"), Named("b"), Named("c")


def one(node):
    return Sum(((1.0, node),))


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("a", one(A)),
        ("0.7*b + 0.3*a", Sum(((0.3, A), (0.7, B)))),
        ("a@3 - 0.5*b", Sum(((1.0, Named("a", 3)), (-0.5, B)))),
        ("@support-bot", one(Stored("support-bot"))),
        ("'my adapter: v2'", one(Named("my adapter: v2"))),
        ('"it\'s \\"so\\""@2', one(Named('it\'s "so"', 2))),
        ("pool/llama-3.2-lora", one(Named("pool/llama-3.2-lora"))),
        ("ties(a, b; density=0.3)", one(Merge("ties", (A, B), None, (("density", 0.3),)))),
        ("ties(0.7*a, 0.3*b)", one(Merge("ties", (A, B), (0.7, 0.3), ()))),
        ("ties(0.5*(a + b), -c)", one(Merge("ties", (Sum(((1.0, A), (1.0, B))), C), (0.5, -1.0), ()))),
        ("ties(0.5*a + b, c)", one(Merge("ties", (Sum(((0.5, A), (1.0, B))), C), None, ()))),
        ("ties((0.5*a), c)", one(Merge("ties", (Sum(((0.5, A),)), C), None, ()))),
        ("0.5*ties(a, b) + c", Sum(((1.0, C), (0.5, Merge("ties", (A, B), None, ()))))),
        ("ties + 0.5*arrow", Sum(((0.5, Named("arrow")), (1.0, Named("ties"))))),
        ("dare_ties(a, b; seed=3, rank=8)", one(Merge("dare_ties", (A, B), None, (("rank", 8), ("seed", 3))))),
        ("arrow(b, @kept, a@2; top_k=none)", Routed("arrow", (Stored("kept"), Named("a", 2), B), (("top_k", None),))),
        ("ensemble(b, 0.5*a + c, base)", Ensemble((Sum(((0.5, A), (1.0, C))), B, Sum(())), None)),
        ("ensemble(3*b, 1*a)", Ensemble((A, B), (1.0, 3.0))),
        ("auto", Auto()),
        ("'auto'", one(Named("auto"))),
        ("base", Sum(())),
        ("0.5*base + a", one(A)),
    ],
)
def test_a_formula_says_this(text, root):
    assert lw.parse(text).root == root


def test_an_option_may_be_a_truth_value_or_a_list():
    assert lw.parse("ties_weighted(a, b; normalize=False)") == lw.parse("ties_weighted(a, b; normalize=false)")
    assert str(Merge("m", (A,), None, (("x", Listed((1, "y z"))),))) == "m(a; x=[1, 'y z'])"


@pytest.mark.parametrize(
    ("canonical", "others"),
    [
        (
            "0.7*a + 0.3*b",
            ["0.3*b+0.7*a", " .7 * a\n+ 3e-1*b", "0.70*a + 0.30*'b'", "0.35*2*a + 0.3*b", "(0.7*a) + (0.3*b)"],
        ),
        ("a", ["1*a", "1.0*a", "+a", "--a", "(a)", "a + 0*b", "a + b - b", "linear(a)", "2*(0.5*a)", "base + a"]),
        ("2*a", ["a + a", "2.0*a", "0.5*a + 1.5*a", "2*(a + b) - 2*b"]),
        ("0.3*a", ["0.1*a + 0.2*a", "0.1*(a + 2*a)", "0.4*a - 0.1*a"]),
        ("b - 0.5*a", ["-0.5*a + b", "b + -0.5*a", "-(0.5*a - b)"]),
        ("0.5*a + 0.5*b", ["linear(a, b)", "linear(b, a)", "0.5*(a + b)", "linear(0.5*a, 0.5*b)"]),
        (
            "ties(a, b; density=0.3)",
            ["ties( b,a ;density=.30)", "ties(0.5*b, 0.5*a; density=3e-1)", "1*ties(a,b;density=0.3)"],
        ),
        ("ties(a; density=1)", ["ties(1*a; density=1.0)", "ties(0*b, 1*a; density=1)", "ties(3*a - 2*a; density=1)"]),
        ("ties(2*a, 1*b)", ["ties(1*b, 2*a)", "ties(1.0*b, 2*(a))"]),
        ("ensemble(a, b)", ["ensemble( b,a )", "ensemble(2*a, 2*b)", "ensemble((a), 2*b - b)"]),
        ("base", ["a - a", "0*a", "'a' - a"]),
        ("arrow(a, b; top_k=1)", ["arrow(b, 'a'; top_k=1.0)", "arrow( b,a;top_k = 1 )"]),
        ("@x - a@1", ["-a@1 + @'x'", "@ x - a @ 1"]),
    ],
)
def test_all_spellings_are_one_formula_with_one_text(canonical, others):
    formula = lw.parse(canonical)
    for other in others:
        found = lw.parse(other)
        assert (found.canonical, found, hash(found)) == (canonical, formula, hash(formula)), other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        ("a", "2*a"),
        ("a", "-a"),
        ("a", "a@1"),
        ("a", "@a"),
        ("a@1", "'a@1'"),
        ("a + b", "ties(a, b)"),
        ("ensemble(a, b)", "0.5*a + 0.5*b"),
        ("ensemble(2*a, 1*b)", "ensemble((2*a), b)"),
        ("ties(a, b)", "ties(1*a, 1*b)"),
        ("ties(a, b)", "ties(a, a, b)"),
        ("ties(a, b)", "ties(a, b; density=0.2)"),
        ("ties(0.5*(a + b), 1*c)", "ties(1*(0.5*a + 0.5*b), 1*c)"),
        ("auto", "'auto'"),
        ("base", "'base'"),
        ("'a - b'", "a - b"),
        ("a-b", "a - b"),
    ],
)
def test_what_is_not_the_same_is_another_formula(one, other):
    assert lw.parse(one) != lw.parse(other)
    assert lw.parse(one).canonical != lw.parse(other).canonical


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("", "this formula is empty", "^"),
        ("0.7*", "here should be an adapter", "    ^"),
        ("a b", "here should be '+', '-' or the end; 'b' cannot stand here", "  ^"),
        ("a + * b", "here should be an adapter", "    ^"),
        ("a-0.5*b", "'a-0.5' is one name; a difference has spaces", "^~~~~"),
        ("a- b", "put a space before '-'", "^"),
        ("a*0.5", "comes first, as in 0.5*a", " ^"),
        ("nan*a", "a weight is a finite number", "   ^"),
        ("1e999*a", "beyond what a float holds", "^~~~~"),
        ("b + 1e-999*a", "beyond what a float holds", "    ^~~~~~"),
        ("1e308*a + 1e308*a", "beyond what a float holds", "^~~~~"),
        ("0.5 a", "0.5 is a weight, and '*'", "^~~"),
        ("2nd + a", "a name that begins with a digit is quoted", "^"),
        ("a + my:adapter", "a formula has no ':' here; quote", "      ^"),
        ("(a + b)/2", "write 0.5*(...) to divide", "       ^"),
        ("a + 'b", "this quote is not closed", "    ^"),
        (r"'a\b'", "a backslash is written twice", "  ^"),
        ("(a + b", "this bracket is not closed by ')'", "^"),
        ("a + b)", "')' cannot stand here", "     ^"),
        ("a@0", "a version of 'a' is a whole number from 1", "  ^"),
        ("a@1.5", "a version of 'a' is a whole number from 1", "  ^~~"),
        ("' a'", "neither begins nor ends with a space", "^~~~"),
        ("a + tyes(a, b)", "no method or router 'tyes', did you mean 'ties'?", "    ^~~~"),
        ("arow(a, b)", "no method or router 'arow', did you mean 'arrow'?", "^~~~"),
        ("mass(a, b)", "no method or router 'mass': it was withdrawn, since it did not choose", "^~~~"),
        ("ties(a, b; densty=1)", "no option 'densty', did you mean 'density'?", "           ^~~~~~"),
        ("ties(a, b; density=2)", "density=2; it takes a finite number of at least 0", "           ^~~~~~~"),
        ("ties(a, b; aggregate=meen)", "did you mean 'mean'?", "           ^~~~~~~~~"),
        ("ties(a, b; density=1, density=1)", "'density' is given twice", "                      ^~~~~~~"),
        ("ties(a, b; density)", "here should be an option", "           ^~~~~~~"),
        ("ties(a, b; density=)", "here should be a value", "                   ^"),
        ("svd(a, b; rank=0)", "rank=0 is not a whole number of 1 or more", "          ^~~~"),
        ("ties(a, b; rank=true)", "rank=True is not a whole number", "           ^~~~"),
        ("ties()", "here should be an adapter", "     ^"),
        ("ties(0.7*a, b)", "give every argument a weight, or none: 1*b", "            ^"),
        ("ties(0*a, 0*b)", "all weights are 0", "^~~~"),
        ("ties(a, b - b)", "this is the base model", "        ^"),
        ("arrow(a, b) + c", "stands alone: nothing follows it", "            ^"),
        ("0.5*arrow(a, b)", "weighs every token by itself and stands alone", "    ^~~~~"),
        ("(arrow(a, b))", "weighs every token by itself and stands alone", " ^~~~~"),
        ("arrow(0.5*a, b)", "an expert is an adapter without", "      ^~~"),
        ("arrow(a, a)", "expert a is given twice", "         ^"),
        ("arrow(a; top_q=1)", "has no option 'top_q', did you mean 'top_k'?", "         ^~~~~"),
        ("lorahub(a, b)", "'lorahub' searches for the weights of a task", "^~~~~~~"),
        ("phatgoose(a, b)", "router 'phatgoose' is trained first", "^~~~~~~~~"),
        ("ensemble(a, b) + c", "an ensemble averages what its members answer and stands alone", "               ^"),
        ("0.5*ensemble(a, b)", "an ensemble stands alone", "    ^~~~~~~~"),
        ("ensemble(a, arrow(b, c))", "weighs every token by itself and stands alone", "            ^~~~~"),
        ("ensemble(0.5*a, b)", "give every argument a weight, or none: 1*b", "                ^"),
        ("ensemble(a - 2*b, c; n=1)", "here should be ')'", "                   ^"),
        ("ensemble(1*a, -1*b)", "the shares of an ensemble's members are above 0", "^~~~~~~~"),
        ("ensemble(base, a - a)", "the members of this ensemble are the base model", "^~~~~~~~"),
        ("a + auto", "'auto' retrieves for each request and stands alone", "    ^~~~"),
    ],
)
def test_an_error_says_what_is_wrong_and_where(text, problem, place):
    with pytest.raises(FormulaError) as caught:
        lw.parse(text)
    said, shown, caret = str(caught.value).split("\n")
    assert problem in said
    assert (shown, caret) == (f"  {text}", f"  {place}")


def test_the_caret_stands_under_wide_characters_and_line_breaks_are_shown_as_spaces():
    with pytest.raises(FormulaError) as caught:
        lw.parse("名前 +\n$")
    assert str(caught.value).split("\n")[1:] == ["  名前 + $", "         ^"]


def test_of_a_long_formula_the_error_shows_what_is_around_the_place():
    text = " + ".join(["a"] * 60 + ["$"] + ["b"] * 60)
    with pytest.raises(FormulaError) as caught:
        lw.parse(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown.startswith("  ... ")
    assert shown.endswith(" ...")
    assert shown[caret.index("^")] == "$"
    assert len(shown) < 140


def test_both_ways_of_typing_a_name_in_unicode_are_one_adapter():
    assert lw.parse("cafe\u0301") == lw.parse("caf\u00e9") == lw.parse("'cafe\u0301'")


def test_a_name_that_no_hub_could_store_is_refused_with_the_reason():
    with pytest.raises(FormulaError, match="at most 200 characters") as caught:
        lw.parse("a" * 201)
    assert isinstance(caught.value.__cause__, InvalidName)


@pytest.mark.parametrize("given", [None, 3, b"a", ["a"], lw.parse])
def test_what_is_no_text_is_refused(given):
    with pytest.raises(FormulaError, match="a formula is text such as"):
        lw.parse(given)


def test_length_depth_adapters_and_digits_have_limits_and_what_is_within_is_read():
    assert lw.parse(" " * (MAX_CHARACTERS - 1) + "a") == lw.parse("a")
    with pytest.raises(FormulaError, match=f"at most {MAX_CHARACTERS} characters, not {MAX_CHARACTERS + 1}"):
        lw.parse(" " * MAX_CHARACTERS + "a")
    assert lw.parse("(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH) == lw.parse("a")
    with pytest.raises(FormulaError, match=f"more than {MAX_DEPTH} deep"):
        lw.parse("(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1))
    assert len(lw.parse(" + ".join(f"a{n}" for n in range(MAX_ADAPTERS))).adapters()) == MAX_ADAPTERS
    with pytest.raises(FormulaError, match=f"at most {MAX_ADAPTERS} adapters"):
        lw.parse(" + ".join(f"a{n}" for n in range(MAX_ADAPTERS + 1)))
    with pytest.raises(FormulaError, match="a number has at most 40 characters"):
        lw.parse(f"0.{'1' * 39}*a")


def test_a_formula_that_would_be_too_long_written_out_is_refused_at_once():
    name = "'" + "\\\\" * 150 + "'"
    text = " + ".join(f"{name}@{n}" for n in range(1, 14))
    assert len(text) < MAX_CHARACTERS
    assert lw.parse(lw.parse(text).canonical) == lw.parse(text)
    many = "+".join(f'"{chr(39) * 190}"@{n}' for n in range(1, 21))
    assert len(many) < MAX_CHARACTERS
    with pytest.raises(FormulaError, match="written out, this formula has"):
        lw.parse(many)
