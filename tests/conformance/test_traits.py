"""Each trait that an entry may declare changes what some suite of this folder asks of it."""

from pathlib import Path

from loraweave import registry


def test_a_suite_asks_for_each_trait():
    suites = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [word for words in registry.TRAITS.values() for word in words if f'"{word}"' not in suites] == []
