"""Which licenses fit into one adapter, as the FSF's list and Creative Commons' charts say, and what the whole is under."""

import itertools

import pytest

from loraweave.errors import InvalidLicense
from loraweave.hub.intake.license_terms import license_of_all, require_one_work

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
