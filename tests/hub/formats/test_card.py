"""Adapter cards in the model hub's format: huggingface_hub reads what is written, and README.md alone brings it back."""

import pytest
import torch
from huggingface_hub import ModelCard

from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._card import description_of
from loraweave.hub.hub import Hub
from loraweave.types import Factors

CARD = {
    "description": "Says which language a text is in.",
    "tags": ["classification", "a: b"],
    "language": ["en", "no", "de"],
    "datasets": ["org/texts", "squad"],
    "license": "CC-BY-NC-4.0",
}


def written(folder, readme=None, **card):
    """A folder that README.md alone describes."""
    factors = {"model.q_proj": Factors(torch.ones(2, 5), torch.ones(3, 2))}
    Adapter("language id", "org/base", factors, card=card).save_pretrained(folder)
    (folder / "loraweave.json").unlink()
    if readme is not None:
        (folder / "README.md").write_bytes(readme.encode() if isinstance(readme, str) else readme)
    return folder


def test_the_model_hubs_own_reader_understands_the_card(tmp_path):
    data = ModelCard.load(written(tmp_path / "out", **CARD) / "README.md").data
    assert (data.base_model, data.library_name, data.license) == ("org/base", "peft", "cc-by-nc-4.0")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert (data.language, data.datasets) == (CARD["language"], CARD["datasets"])
    assert data.tags == ["lora", "loraweave", "classification", "a: b"]


def test_the_card_comes_back_from_the_readme_alone(tmp_path):
    again = Adapter.from_pretrained(written(tmp_path / "out", **CARD))
    assert {key: again.card[key] for key in CARD} == {**CARD, "license": "cc-by-nc-4.0"}
    assert again.base_model == "org/base"


def test_a_hub_reads_the_fields_of_the_card_and_exports_them_again(tmp_path):
    folder = written(tmp_path / "in", **CARD)
    with Hub(tmp_path / "hub") as hub:
        record = hub.add(folder, name="x")
        assert (record.description, record.tags) == (CARD["description"], tuple(CARD["tags"]))
        assert record.license == "CC-BY-NC-4.0"
        assert record.language == ("en", "no", "de")
        assert record.card["datasets"] == CARD["datasets"]
        hub["x"].export(tmp_path / "out")
    matters = [(path / "README.md").read_text().split("\n# ")[0] for path in (folder, tmp_path / "out")]
    assert matters[0] == matters[1]


@pytest.mark.parametrize(
    ("front", "want"),
    [
        ("license: [mit, apache-2.0]", "Apache-2.0 AND MIT"),
        ("license:\n- apache-2.0\n- other\nlicense_name: our-own", "Apache-2.0 AND LicenseRef-our-own"),
        ("license: [cc-by-4.0]", "CC-BY-4.0"),
        ("license: [mit, unknown]", "LicenseRef-unknown AND MIT"),
        ("license: [mit, 3]", "LicenseRef-unknown AND MIT"),
        ("license: []", None),
    ],
)
def test_a_list_of_licenses_is_read_as_all_of_them(tmp_path, front, want):
    folder = written(tmp_path / "out", f"---\n{front}\n---\n# x\n")
    assert Adapter.from_pretrained(folder).card.get("license") == want
    with Hub(tmp_path / "hub") as hub:
        assert hub.add(folder, name="x").license == want


@pytest.mark.parametrize(
    ("license", "front", "back"),
    [
        ("Apache-2.0", ("apache-2.0", None), "Apache-2.0"),
        ("GPL-3.0-only", ("gpl-3.0", None), "GPL-3.0-only"),
        ("ODbL-1.0", ("odbl", None), "ODbL-1.0"),
        ("LicenseRef-llama3.1", ("llama3.1", None), "LicenseRef-llama3.1"),
        ("LicenseRef-Our-Terms", ("other", "Our-Terms"), "LicenseRef-Our-Terms"),
        ("GPL-3.0-or-later", ("other", "GPL-3.0-or-later"), "GPL-3.0-or-later"),
        ("MIT OR Apache-2.0", ("other", "MIT OR Apache-2.0"), "MIT OR Apache-2.0"),
        ("LicenseRef-other", ("other", None), "LicenseRef-other"),
        (None, (None, None), None),
    ],
)
def test_a_license_keeps_its_meaning_in_the_model_hubs_words(tmp_path, license, front, back):
    folder = written(tmp_path / "out", license=license)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name) == front
    with Hub(tmp_path / "hub") as hub:
        assert hub.add(folder, name="x").license == back


@pytest.mark.parametrize(
    ("matter", "languages"),
    [("language: no", ("no",)), ("language: [en, no]", ("en", "no")), ("language: {a: b}", ()), ("language: 3", ())],
)
def test_languages_are_read_as_people_write_them(tmp_path, matter, languages):
    folder = written(tmp_path / "out", f"---\n{matter}\n---\n")
    with Hub(tmp_path / "hub") as hub:
        assert hub.add(folder, name="x").language == languages


def test_a_readme_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path):
    readme = b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# x\r\n\r\nTells apart.\r\n"
    card = Adapter.from_pretrained(written(tmp_path / "out", readme)).card
    assert (card["license"], card["description"]) == ("mit", "Tells apart.")


def test_only_the_first_megabyte_of_a_readme_is_read(tmp_path):
    readme = b"---\nlicense: mit\n---\n# x\n\n" + "é".encode() * 2**20
    card = Adapter.from_pretrained(written(tmp_path / "out", readme)).card
    assert card["license"] == "mit"
    assert card["description"] == "é" * 2000


@pytest.mark.parametrize(
    ("body", "description"),
    [
        ("# Title\n\nSorts words.\n\nMore.", "Sorts words."),
        ("<!-- Provide a quick\n\nsummary. -->\n\n## Uses\n\n[More Information Needed]\n\nReal text.", "Real text."),
        ("![badge](http://x/y.png)\n\n- a list\n\n| a | table |\n\n> quoted\n\n<div>x</div>\n\nText.", "Text."),
        ("```\ncode\n\nstill code\n```\n\nA [link](http://x) stays\nas text.", "A link stays as text."),
        ("    indented code\n\n1. numbered\n\nLast.", "Last."),
        ("<!-- never closed\n\ntext", ""),
        ("```\nnever closed\n\ntext", ""),
        ("# Only a title", ""),
        ("", ""),
        ("x" * 5000, "x" * 2000),
    ],
)
def test_the_description_is_the_first_paragraph_of_prose(body, description):
    assert description_of(body) == description
