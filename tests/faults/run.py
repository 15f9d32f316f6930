"""Runs parts of the suite in a process of its own, which may fork, since it has no threads; prints their reports as JSON.

Its arguments are an empty folder, and JSON: a list of [module, arguments of its `report` after the folder].
"""

import importlib
import json
import sys
from pathlib import Path

import torch


def main():
    torch.set_num_threads(1)
    root, reports = Path(sys.argv[1]).resolve(), []
    for number, (module, arguments) in enumerate(json.loads(sys.argv[2])):
        (folder := root / str(number)).mkdir()
        reports.append(importlib.import_module(module).report(folder, *arguments))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
