"""Texts as a picture can show them: any script that an installed font has, never as formulas, and not too long."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

FAMILIES = {"sans": "DejaVu Sans", "mono": "DejaVu Sans Mono"}
# a font without real glyphs, which draws every character as a box
PLACEHOLDER = "Last Resort"


class Glyphs:
    """Fonts for some texts, and the texts in characters that these fonts have. Needs matplotlib.

    matplotlib's own font comes first, then installed ones for characters that it lacks. A character of no font becomes its
    number, such as \\u7684, so that two names never look the same.
    """

    def __init__(self, texts: Iterable[str], kind: str = "sans") -> None:
        from matplotlib import font_manager

        wanted = {ord(character) for text in texts for character in _visible(text)}
        self.families = [FAMILIES[kind]]
        self._known = _characters(font_manager.findfont(FAMILIES[kind]))
        for font in font_manager.fontManager.ttflist:
            missing = wanted - self._known
            if not missing:
                break
            if font.name in self.families or font.name.startswith(PLACEHOLDER):
                continue
            # a family is asked for by name, and the file that then opens must be this one
            if missing & _characters(font.fname) and font_manager.findfont(font.name) == font.fname:
                self.families.append(font.name)
                self._known |= _characters(font.fname)

    def show(self, text: str, max_width: int) -> str:
        """The text in what the fonts have, its middle left out beyond `max_width` columns."""
        shown = "".join(
            character if ord(character) in self._known else character.encode("unicode_escape").decode()
            for character in _visible(text)
        )
        if width(shown) <= max_width:
            return shown
        head, tail = "", ""
        while width(head + tail) < max_width - 1:
            head, tail = (shown[: len(head) + 1], tail) if len(head) <= len(tail) else (head, shown[-len(tail) - 1 :])
        return f"{head}…{tail}"


def width(text: str) -> int:
    """How many columns of a fixed-width font the text takes: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _visible(text: str) -> str:
    marked = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in marked)


def _characters(path: str) -> set[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        # a file that matplotlib lists and cannot open is passed over, as matplotlib does
        return set()
