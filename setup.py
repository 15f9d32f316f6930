"""Maps the rooms, which are folders at the root, to `loraweave.<room>`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("hub", "retrieval", "routers", "composer")

packages = ["loraweave", "loraweave.common", "loraweave.lowrank"]
package_dir = {"loraweave": "loraweave"}
for room in ROOMS:
    package_dir[f"loraweave.{room}"] = room
    packages.append(f"loraweave.{room}")
    packages.extend(f"loraweave.{room}.{package}" for package in find_packages(room))

setup(packages=packages, package_dir=package_dir)
