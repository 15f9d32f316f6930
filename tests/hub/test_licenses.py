"""Licenses: one spelling for each, refused or kept when unknown, and found by what they permit."""

import itertools
import warnings

import pytest
import tiny_hubs
from packaging.licenses import canonicalize_license_expression

from loraweave.errors import InvalidLicense
from loraweave.hub.hub import Hub
from loraweave.hub.licenses import (
    LISTED,
    RENAMED,
    UNLISTED,
    canonical,
    is_accepted,
    license_of_all,
    of_card,
    require_one_work,
)


def adapter(name, **card):
    return tiny_hubs.adapter(len(name), name, card=card)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("MIT", "MIT"),
        ("apache-2.0", "Apache-2.0"),
        (" cc-by-nc-4.0\n", "CC-BY-NC-4.0"),
        ("bsl-1.0", "BSL-1.0"),
        ("odbl", "ODbL-1.0"),
        ("gpl-3.0", "GPL-3.0-only"),
        ("GPL-2.0+ with classpath-exception-2.0", "GPL-2.0-or-later WITH Classpath-exception-2.0"),
        ("mit or (apache-2.0 and cc0-1.0)", "MIT OR (Apache-2.0 AND CC0-1.0)"),
        ("llama3.1", "LicenseRef-llama3.1"),
        ("Gemma", "LicenseRef-gemma"),
        ("openrail", "LicenseRef-openrail"),
        ("openrail++", "LicenseRef-openrail-plus-plus"),
        ("other", "LicenseRef-other"),
        ("LicenseRef-our-own", "LicenseRef-our-own"),
    ],
)
def test_a_license_is_stored_in_the_spelling_of_spdx(given, stored):
    assert canonical(given) == stored
    assert canonical(stored) == stored


def test_every_id_of_the_model_hub_is_known_and_keeps_its_own_spelling_apart():
    ids = sorted(LISTED | UNLISTED | set(RENAMED))
    stored = [canonical(name) for name in ids]
    assert len(set(map(str.casefold, stored))) == len(ids)
    # the table says which of them are SPDX's own
    assert all(canonicalize_license_expression(name).casefold() == name for name in LISTED)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("apache", "'apache-2.0'"),
        ("llama-3", "'llama3'"),
        ("mit license", "'mit'"),
        ("my own words", "LicenseRef-my-own-words"),
        ("MIT MIT", "SPDX"),
        ("(" * 51 + "MIT" + ")" * 51, "105 characters with 51 groups"),
        ("MIT OR " * 300 + "MIT", "2103 characters with 0 groups; the limits are 1000 and 50"),
        ("__import__('os')", "SPDX"),
        ("", "SPDX"),
    ],
)
def test_what_is_no_license_is_refused_with_the_nearest_ids_and_a_way_out(given, hint):
    with pytest.raises(InvalidLicense) as caught:
        canonical(given)
    assert hint in str(caught.value)
    assert "LicenseRef-" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_card_may_say_anything_and_a_warning_tells_what_is_stored():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_card("apache-2.0", "x") == "Apache-2.0"
        assert of_card("unknown", "x") is of_card(" ", "x") is None
    with pytest.warns(UserWarning, match="adapter 'x'.*'LicenseRef-free-for-all'.*not an SPDX expression"):
        assert of_card("free for all!", "adapter 'x'") == "LicenseRef-free-for-all"


@pytest.mark.parametrize(
    ("license", "wanted", "accepts"),
    [
        ("MIT", "mit", True),
        ("MIT", ["apache-2.0", "mit"], True),
        ("MIT", [], False),
        (None, "MIT", False),
        ("MIT OR GPL-3.0-only", "MIT", True),
        ("MIT AND GPL-3.0-only", "MIT", False),
        ("MIT AND GPL-3.0-only", ["GPL-3.0", "MIT"], True),
        ("MIT AND GPL-3.0-only", "mit and gpl-3.0-only", True),
        ("(MIT OR Apache-2.0) AND CC0-1.0", ["Apache-2.0", "CC0-1.0"], True),
        ("MIT OR Apache-2.0 AND CC0-1.0", "CC0-1.0", False),
        ("MIT OR Apache-2.0 AND CC0-1.0", "MIT", True),
        ("GPL-2.0-or-later WITH Classpath-exception-2.0", "GPL-2.0-or-later", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "GPL-2.0-only WITH Classpath-exception-2.0", True),
        ("GPL-2.0-only", "GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("GPL-2.0-or-later", "gpl-2.0", True),
        ("GPL-2.0-only", "GPL-2.0-or-later", False),
        ("Apache-2.0+", "Apache-2.0", True),
        ("CC-BY-NC-4.0", "CC-BY-4.0", False),
        ("LicenseRef-llama3", "llama3", True),
        ("LicenseRef-Ours", "licenseref-ours", True),
        # as an older hub may have stored it
        ("apache-2.0", "Apache-2.0", True),
        ("free for all", "LicenseRef-free-for-all", True),
    ],
)
def test_a_filter_finds_what_someone_who_accepts_these_licenses_can_take(license, wanted, accepts):
    assert is_accepted(license, wanted) is accepts


def test_the_hub_stores_finds_and_changes_licenses_in_one_spelling(tmp_path):
    with Hub(tmp_path) as hub:
        hub.add(adapter("a"), license="mit or gpl-3.0")
        hub.add(adapter("bb", license="llama3"))
        hub.add(adapter("ccc"))
        with pytest.warns(UserWarning, match=r"LicenseRef-whatever"):
            hub.add(adapter("dddd", license="whatever"))
        assert [record.license for record in hub] == [
            "MIT OR GPL-3.0-only",
            "LicenseRef-llama3",
            None,
            "LicenseRef-whatever",
        ]
        assert [record.name for record in hub.records(license=["MIT", "llama3"])] == ["a", "bb"]
        assert hub.update("ccc", license="cc0-1.0").license == "CC0-1.0"
        assert hub.update("ccc", license="").license is None
        assert hub.update("dddd", description="the license stays").license == "LicenseRef-whatever"
        for act in (
            lambda: hub.add(adapter("e"), license="Apache2"),
            lambda: hub.update("a", license="Apache2"),
            lambda: hub.records(license="Apache2"),
        ):
            with pytest.raises(InvalidLicense, match=r"'Apache2'.*'apache-2\.0'"):
                act()
        assert "e" not in hub


# Creative Commons' chart of what can be remixed with what (version 4.0 of each)
REMIXES = {
    ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    ("cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
}
CHART = ["cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0"]

# the FSF's matrix and list: rows that it says cannot be combined into one program
INCOMPATIBLE = [
    ("gpl-3.0", "cc-by-nc-4.0"),
    ("GPL-2.0-only", "apache-2.0"),
    ("GPL-2.0-only", "GPL-3.0-only"),
    ("GPL-2.0-only", "LGPL-3.0-only"),
    ("GPL-2.0-only", "AGPL-3.0-only"),
    ("GPL-2.0-only", "cc-by-sa-4.0"),
    ("gpl", "cc-by-nc-sa-3.0"),
    ("GPL-3.0-or-later", "ms-pl"),
    ("AGPL-3.0-only", "epl-1.0"),
    ("GPL-2.0-or-later", "osl-3.0"),
    ("gpl-3.0", "afl-3.0"),
    ("gpl-3.0", "odbl"),
]
COMPATIBLE = [
    ("GPL-2.0-or-later", "apache-2.0"),
    ("GPL-2.0-or-later", "GPL-3.0-only"),
    ("GPL-3.0-only", "apache-2.0"),
    ("GPL-3.0-only", "AGPL-3.0-only"),
    ("GPL-2.0-only", "LGPL-2.1-only"),
    ("LGPL-2.1-only", "GPL-3.0-only"),
    ("gpl-3.0", "cc-by-sa-4.0"),
    ("cc-by-sa-3.0", "cc-by-sa-4.0"),
    ("GPL-2.0-only", "mit"),
    ("GPL-2.0-only WITH Classpath-exception-2.0", "apache-2.0"),
    ("mit", "cc-by-nc-4.0"),
    # nobody has said
    ("gpl-3.0", "llama3"),
    ("gpl-3.0", "our own words"),
    ("cc-by-nc-4.0", None),
]


def fit(*licenses):
    try:
        require_one_work((f"number {place}", license) for place, license in enumerate(licenses))
    except InvalidLicense:
        return False
    return True


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(CHART, 2)))
def test_what_can_be_remixed_is_what_creative_commons_chart_says(first, second):
    assert fit(first, second) is any({first, second} <= set(remix) for remix in REMIXES)


@pytest.mark.parametrize(("pair", "want"), [(pair, False) for pair in INCOMPATIBLE] + [(pair, True) for pair in COMPATIBLE])
def test_pairs_fit_as_the_free_software_foundation_says(pair, want):
    assert fit(*pair) is fit(*reversed(pair)) is want


def test_of_alternatives_one_that_fits_is_enough_and_of_joint_terms_all_must_fit():
    assert fit("MIT OR GPL-3.0-only", "CC-BY-NC-4.0")
    assert not fit("MIT AND GPL-3.0-only", "CC-BY-NC-4.0")
    assert not fit("GPL-2.0-only OR GPL-3.0-only", "CC-BY-NC-4.0 OR CC-BY-ND-4.0")
    assert fit("GPL-2.0-only OR CC-BY-NC-4.0", "Apache-2.0")
    # any two of them fit, and all three do not
    assert not fit("GPL-2.0-only OR CC-BY-NC-4.0", "Apache-2.0", "GPL-2.0-or-later")


@pytest.mark.parametrize(
    ("licenses", "said"),
    [
        ([("a", "cc-by-nd-4.0"), ("b", None)], "adapter 'a' is under CC-BY-ND-4.0, .*permits no"),
        (
            [("a", "mit"), ("b", "gpl-3.0"), ("b", "cc-by-nc-4.0")],
            "adapter 'b' is under GPL-3.0-only and adapter 'b' under CC-BY-NC-4.0",
        ),
        (
            [("a", "Apache-2.0"), ("b", "GPL-2.0-or-later"), ("c", "GPL-2.0-only OR CC-BY-NC-4.0")],
            "all of Apache-2.0, GPL-2.0-only OR CC-BY-NC-4.0, GPL-2.0-or-later",
        ),
    ],
)
def test_a_refusal_names_adapters_licenses_and_the_way_out(licenses, said):
    with pytest.raises(InvalidLicense, match=said) as caught:
        require_one_work(licenses)
    assert "allow_licenses=True" in str(caught.value)


@pytest.mark.parametrize(
    ("licenses", "want"),
    [
        (["mit", "apache-2.0"], "Apache-2.0 AND MIT"),
        (["apache-2.0", "mit", "MIT"], "Apache-2.0 AND MIT"),
        (["mit or gpl-3.0", "cc0-1.0"], "(MIT OR GPL-3.0-only) AND CC0-1.0"),
        (["mit and cc0-1.0", "mit"], "CC0-1.0 AND MIT"),
        (["mit or gpl-3.0"], "MIT OR GPL-3.0-only"),
        (["mit", None], "LicenseRef-unknown AND MIT"),
        (["mit", "Unknown"], "LicenseRef-unknown AND MIT"),
        (["free for all!", "mit"], "LicenseRef-free-for-all AND MIT"),
        ([None, ""], None),
        ([], None),
        ([f"LicenseRef-{number}-{'x' * 90}" for number in range(11)], "LicenseRef-several"),
    ],
)
def test_the_license_of_the_whole_names_that_of_every_part(licenses, want):
    assert license_of_all(licenses) == want
