"""A script of several measurements, each a command with options of its own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import ModuleType


def run(description: str | None, commands: Mapping[str, ModuleType]) -> None:
    """Does what the command line asks for; a command's module has `add_arguments(parser)` and `main(options)`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in commands.items():
        module.add_arguments(subparsers.add_parser(name))
    options = parser.parse_args()
    commands[options.command].main(options)
