"""The card of an adapter folder: reading loraweave.json, or else README.md's front matter, and writing both."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loraweave.common.checks import entry
from loraweave.errors import AdapterCorrupt, AdapterUnsupported, InvalidLicense
from loraweave.hub.formats._files import MAX_JSON_BYTES, open_file, present, read_json
from loraweave.hub.licenses import LISTED, RENAMED, UNLISTED, canonical, license_of_all
from loraweave.types import Fingerprint

SIDECAR = "loraweave.json"
README = "README.md"
MAX_README_BYTES = 2**20
# front matter is a few lines; longer ones are not worth the seconds that parsing takes
MAX_FRONT_MATTER = 2**16
MAX_FALLBACK_TEXT = 10_000

# the model hub refuses anything but an id as the base, such as a folder
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# the tags that the writer puts before an adapter's own
OWN_TAGS = ("lora", "loraweave")

# read back from adapter_config.json and the tensors, so they are not written twice
DERIVED = ("peft", "stored_dtype")


def read_card(folder: Path) -> tuple[dict[str, Any], Fingerprint | None, dict[str, Any]]:
    """Return a folder's (card, fingerprint of the base, notes on the zeros that our writer added for PEFT).

    Without loraweave.json, README.md gives license, tags, languages, data sets, and a description in its first paragraph. A
    damaged README never blocks. Raises AdapterCorrupt for a damaged loraweave.json: it holds the base's fingerprint.
    """
    if not present(folder, SIDECAR):
        return _from_readme(folder), None, {}
    card = read_json(folder, SIDECAR)
    layout = entry(card, "layout", dict) or {}
    stored = card.pop("fingerprint", None)
    card.pop("layout", None)
    if "name" in card and entry(card, "name", str) is None:
        raise AdapterCorrupt(f"{folder}: {SIDECAR} has a name that is not text")
    try:
        fingerprint = None if stored is None else Fingerprint.from_json(stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterCorrupt(f"{folder}: {SIDECAR} has a fingerprint that cannot be read ({error!r})") from error
    return card, fingerprint, layout


def base_model_of_readme(folder: Path) -> str:
    """Return the base model that README.md names, or an empty text."""
    named = as_list(_readme(folder)[0].get("base_model"))
    return model_id(named[0]) if len(named) == 1 else ""


def model_id(value: object) -> str:
    """Return the value as a model's id, or an empty text if it cannot be one."""
    return value if isinstance(value, str) and len(value) < 500 else ""


def sidecar_text(card: Mapping[str, Any], fingerprint: Fingerprint | None, layout: Mapping[str, Any]) -> str:
    """Return the text of loraweave.json. Raises AdapterUnsupported if the card is not JSON or too large."""
    content: dict[str, Any] = {key: value for key, value in card.items() if key not in DERIVED}
    if fingerprint is not None:
        content["fingerprint"] = fingerprint.to_json()
    if layout:
        content["layout"] = layout
    return json_text(content, "the card", indent=1)


def json_text(value: Mapping[str, Any], what: str, *, indent: int | None = None) -> str:
    """Return the value as JSON. Raises AdapterUnsupported if it has no JSON form, or exceeds the limit of reading."""
    try:
        separators = (",", ":") if indent is None else None
        text = json.dumps(plain(value), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterUnsupported(f"the card is not JSON and cannot be written: {error}") from error
    if size > MAX_JSON_BYTES:
        raise AdapterUnsupported(f"{what} has {size} bytes as JSON, more than the limit of {MAX_JSON_BYTES}")
    return text


def readme_text(base_model: str, card: Mapping[str, Any], facts: Mapping[str, str], library: str = "peft") -> str:
    """Return an adapter's README.md: front matter for the model hub, the card for people, and `facts` on the tensors."""
    tags = [*OWN_TAGS, *[str(tag) for tag in as_list(card.get("tags"))]]
    matter = front_matter(base_model, library, tags, entry(card, "license", str))
    for key in ("language", "datasets"):
        if listed := texts(card.get(key)):
            matter[key] = listed
    front = yaml.safe_dump(matter, allow_unicode=True, sort_keys=False)
    parts = [f"---\n{front}---", f"# {_one_line(card.get('name') or 'LoRA adapter')}"]
    parts += [str(card[key]) for key in ("description", "note") if card.get(key)]
    facts = {"Base model": base_model or "not recorded", **facts}
    parts.append("\n".join(f"- {name}: {_one_line(value)}" for name, value in facts.items()))
    if examples := as_list(card.get("examples")):
        # an input alone, or with its output
        shown = ["\n-> ".join(map(str, as_list(one))) or _text(one) for one in examples[:20]]
        parts.append("## Sample inputs\n\n" + "\n\n".join(map(_indent, shown)))
    for key in ("scores", "data_license", "data", "recipe", "sources"):
        if card.get(key):
            title = "Licence of the data" if key == "data_license" else key.capitalize()
            parts.append(f"## {title}\n\n{_indent(_text(card[key]))}")
    parts.append("Load it with `PeftModel.from_pretrained(base, folder)` or `loraweave.Adapter.from_pretrained(folder)`.")
    return "\n\n".join(parts) + "\n"


def front_matter(base_model: str, library: str, tags: Sequence[str], license: str | None) -> dict[str, Any]:
    """Return the fields of a card's front matter that the model hub reads."""
    matter: dict[str, Any] = {}
    if MODEL_ID.fullmatch(base_model):
        matter = {"base_model": base_model, "base_model_relation": "adapter"}
    matter |= {"library_name": library, "tags": list(dict.fromkeys(tags))}
    return matter | (license_fields(license) if license else {})


def shared_card(title: str, base_model: str, license: str | None, kind: str, code: str, sections: Mapping[str, str]) -> str:
    """Return the README.md of a composition or the like: front matter, Python code that uses it, and texts by title."""
    front = yaml.safe_dump(front_matter(base_model, "loraweave", [*OWN_TAGS, kind], license), sort_keys=False)
    # a folder of the writer's machine tells readers nothing
    known = base_model if MODEL_ID.fullmatch(base_model) else "a local folder" if base_model else "not recorded"
    facts = f"- Base model: {known}\n- Licence: {_one_line(license or 'not known')}"
    parts = [f"---\n{front}---", f"# {_one_line(title)}", f"```python\nimport loraweave as lw\n\n{code}\n```", facts]
    parts += [f"## {name}\n\n{_indent(text)}" for name, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def plain(value: Any) -> Any:
    """Return the value with mappings, tuples and sets replaced by the dicts and lists that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return sorted(map(plain, value)) if isinstance(value, set | frozenset) else value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader of safe YAML without aliases, whose merging could multiply a short text without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _from_readme(folder: Path) -> dict[str, Any]:
    matter, body = _readme(folder)
    card: dict[str, Any] = {}
    stated = entry(matter, "description", str) or description_of(body)
    for key, value in (("license", license_of_fields(matter)), ("description", stated)):
        if value:
            card[key] = value[:MAX_FALLBACK_TEXT]
    for key in ("tags", "language", "datasets"):
        # YAML reads `no`, the code of Norwegian, as false
        values = ["no" if one is False else one for one in as_list("no" if matter.get(key) is False else matter.get(key))]
        listed = [one[:200] for one in texts(values) if one not in OWN_TAGS]
        if listed:
            card[key] = listed[:100]
    return card


def _readme(folder: Path) -> tuple[dict[str, Any], str]:
    """Return README.md's front matter and the text after it; ({}, "") if the front matter is missing or damaged."""
    if not present(folder, README):
        return {}, ""
    try:
        with open_file(folder, README) as (file, size):
            # a cut in the middle of a character is not damage
            text = file.read(min(size, MAX_README_BYTES)).decode("utf-8", "strict" if size <= MAX_README_BYTES else "ignore")
        text = text.removeprefix("\ufeff")
        if not text.startswith("---"):
            return {}, ""
        front, _, body = text[3:].partition("\n---")
        value = {} if len(front) > MAX_FRONT_MATTER else yaml.load(front, Loader=_Loader)
    except (AdapterCorrupt, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        # a card is no reason to refuse the tensors
        return {}, ""
    return (value, body) if isinstance(value, dict) and value else ({}, "")


def as_list(value: Any) -> Sequence[Any]:
    """Return a list or tuple as a list, a text as a list of one text, and [] for anything else."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, list | tuple) else []


def texts(value: Any) -> list[str]:
    """Return the texts among `as_list(value)`."""
    return [one for one in as_list(value) if isinstance(one, str)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(plain(value), indent=1, ensure_ascii=False, default=str)


def _indent(text: str) -> str:
    # an indented block shows any text as it is, whereas a fence could be closed by the text itself
    return "\n".join(f"    {line}" for line in text.splitlines())


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


_ID_OF = {canonical(name): name for name in sorted(LISTED | UNLISTED | set(RENAMED))}


def license_fields(license: str) -> dict[str, str]:
    """Return the front matter's fields for a license: an id that the model hub knows, or `other` and the name."""
    try:
        known = canonical(license)
    except InvalidLicense:
        return {"license": "other", "license_name": license}
    if known in _ID_OF:
        return {"license": _ID_OF[known]}
    return {"license": "other", "license_name": known.removeprefix("LicenseRef-")}


def license_of_fields(matter: Mapping[str, Any]) -> str:
    """Return the license that front matter states: the name for `other`, an expression of all for a list, "" for none."""
    listed = matter.get("license")
    if isinstance(listed, list):
        return license_of_all(_name_license(one, matter) for one in listed) or ""
    return _name_license(listed, matter)


def _name_license(stated: object, matter: Mapping[str, Any]) -> str:
    if not isinstance(stated, str):
        return ""
    name = entry(matter, "license_name", str) or ""
    if stated.strip().casefold() != "other" or not name.strip():
        return stated
    for text in (name, f"LicenseRef-{name.strip()}"):
        with suppress(InvalidLicense):
            return canonical(text)
    return name


MAX_DESCRIPTION = 2_000

_PARAGRAPH = re.compile(r"\n\s*\n")
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_FENCED = re.compile(r"^(```|~~~).*?(?:^\1|\Z)", re.DOTALL | re.MULTILINE)
_IMAGE = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)")
_LINK = re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)")

# headings, lists, tables, quotes, tags, rules and placeholders are no sentences about the adapter
_MARKUP = re.compile(r"[#\-*+|<>=_]|\d+[.)]\s|\[|    |\t")
_PLACEHOLDER = "more information needed"


def description_of(body: str) -> str:
    """Return the first paragraph of prose on one line, with links as their texts; "" if there is none. Fetches nothing."""
    text = _FENCED.sub("\n\n", _COMMENT.sub("\n\n", body.replace("\r\n", "\n")))
    for paragraph in _PARAGRAPH.split(text):
        plain = _LINK.sub(r"\1", _IMAGE.sub("", paragraph)).strip("\n")
        if not plain.strip() or _MARKUP.match(plain) or _PLACEHOLDER in plain.casefold():
            continue
        return " ".join(plain.split())[:MAX_DESCRIPTION]
    return ""
