"""A griffe extension for the reference: below a function's docstring, a table of its parameters made from the signature.

A row has the name, the type, the first sentence of the docstring that has the name in backticks, and the default.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import (
    DocstringParameter,
    DocstringSectionParameters,
    DocstringSectionText,
    Extension,
    Function,
    ParameterKind,
)

# a signature of fewer is read at a glance
FEWEST = 3
VARIADIC = (ParameterKind.var_positional, ParameterKind.var_keyword)


class Parameters(Extension):
    """Adds the table to each function and method with a docstring and at least FEWEST parameters."""

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        """Put the docstring's text and the table in the place of what griffe would parse."""
        parameters = [p for p in func.parameters if p.name not in ("self", "cls") and p.kind not in VARIADIC]
        if func.docstring is None or len(parameters) < FEWEST:
            return
        text = func.docstring.value
        rows = [
            DocstringParameter(p.name, annotation=p.annotation, value=p.default, description=about(p.name, text))
            for p in parameters
        ]
        vars(func.docstring)["parsed"] = [DocstringSectionText(text), DocstringSectionParameters(rows)]


def about(name: str, text: str) -> str:
    """Return the first sentence of a docstring with the parameter's name in backticks, "" if there is none."""
    sentences = re.split(r"(?<=[.;])\s+|\n\s*\n|\n(?=\s*- )", text)
    said = next((part for part in sentences if re.search(rf"`{re.escape(name)}\b", part)), "")
    return " ".join(said.split()).rstrip(";")
