"""A user's YAML file, read as plain values: what YAML would guess at or expand is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loraweave.errors import LoraweaveError

# far above what a person writes
MAX_BYTES = 2**20


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """A loader without aliases, which could stand for any amount, and without keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not read: write the value out", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# YAML 1.1 reads 1e-3 as a text
_Plain.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789"))


def read_yaml(path: Path, error: type[LoraweaveError]) -> dict[str, Any]:
    """Read the mapping that a file holds. Raises `error`, with the line, for anything else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{path} has {path.stat().st_size} bytes, above the limit of {MAX_BYTES}")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read ({problem}); give a YAML file") from problem
    except yaml.YAMLError as problem:
        raise error(f"{path} is not YAML: {' '.join(str(problem).split())}") from problem
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise error(f"{path} holds {content!r:.60}; its lines are to be 'key: value'")
    return dict(content)
