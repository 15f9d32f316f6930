"""Maps the rooms, which are folders at the root, to `loraweave.<room>`; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("hub", "retrieval", "routers", "composer", "serving", "extensions")
# the files of `loraweave demo`, which reads them from examples/ beside the rooms
EXAMPLES = ("pool", "in_context", "data")

packages = ["loraweave", "loraweave.cli", "loraweave.common", "loraweave.extend", "loraweave.lowrank"]
package_dir = {"loraweave": "loraweave"}
for room in ROOMS:
    package_dir[f"loraweave.{room}"] = room
    packages.append(f"loraweave.{room}")
    packages.extend(f"loraweave.{room}.{package}" for package in find_packages(room))

for name in EXAMPLES:
    if Path("examples", name).is_dir() and "editable_wheel" not in sys.argv:
        package_dir[f"loraweave.examples.{name}"] = f"examples/{name}"
        packages.append(f"loraweave.examples.{name}")

if "editable_wheel" in sys.argv:
    # then setuptools puts this folder on the path, where links in loraweave/ lead to the rooms. With the map it would
    # install an import hook, which no type checker or editor follows
    package_dir = {"": "."}

setup(packages=packages, package_dir=package_dir)
