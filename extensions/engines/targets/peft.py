"""PEFT's folder, exact for everything that PEFT's LoRA has a form for: every rank, DoRA, biases, convolutions, heads."""

from pathlib import Path
from typing import Any

from loraweave.extend.formats import Contents, module_names
from loraweave.extensions.engines.export import TIED_MODULES, Target


class Peft(Target):
    """A folder for `peft.PeftModel.from_pretrained` and any other program that reads PEFT's folders."""

    drops_zeros = False

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        """Leave the checks to the writer, which knows PEFT's rules."""

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        heads = [
            f"the trained head {head!r} is a copy of its own: on a base that ties its embeddings peft computes with it "
            "alone, but merging it into the base and saving that loses the head or the tie"
            for head in sorted(contents.heads)
            if set(head.split(".")) & TIED_MODULES
        ]
        both = "on a base that ties its embeddings, merging it into the base changes both sides"
        tied = sorted(set(module_names(contents.layers)) & TIED_MODULES)
        return [*heads, *(f"{module!r} has an update: {both}" for module in tied)]
