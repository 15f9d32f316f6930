"""What a model card says in prose: the first paragraph that is neither markup nor a template's placeholder."""

from __future__ import annotations

import re

MAX_DESCRIPTION = 2_000

_PARAGRAPH = re.compile(r"\n\s*\n")
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_FENCED = re.compile(r"^(```|~~~).*?(?:^\1|\Z)", re.DOTALL | re.MULTILINE)
_IMAGE = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)")
_LINK = re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)")

# headings, lists, tables, quotes, tags, rules and placeholders are no sentence about the adapter
_MARKUP = re.compile(r"[#\-*+|<>=_]|\d+[.)]\s|\[|    |\t")
_PLACEHOLDER = "more information needed"


def description_of(body: str) -> str:
    """The first paragraph of prose, links as their texts, on one line; empty when there is none. Nothing is fetched."""
    text = _FENCED.sub("\n\n", _COMMENT.sub("\n\n", body.replace("\r\n", "\n")))
    for paragraph in _PARAGRAPH.split(text):
        plain = _LINK.sub(r"\1", _IMAGE.sub("", paragraph)).strip("\n")
        if not plain.strip() or _MARKUP.match(plain) or _PLACEHOLDER in plain.casefold():
            continue
        return " ".join(plain.split())[:MAX_DESCRIPTION]
    return ""
