"""The interface of export targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats._peft_config import path_of
from loraweave.hub.formats.peft import Peft as PeftFolder
from loraweave.types import Factors

# modules whose weights many base models share with each other
TIED_MODULES = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out"}


class Target(ABC):
    """A program that loads adapters.

    `limit` is the largest rank that it takes, None for no limit. With `one_rank` every layer gets the largest rank of any by
    rows of zeros. `base` is a model, its config, folder or id, for targets that must know its architecture.
    """

    limit: ClassVar[int | None] = None
    one_rank: ClassVar[bool] = False
    # a file that every folder of this target has, by which an earlier one is known
    file: ClassVar[str] = "adapter_config.json"
    # whether layers without an update and biases of zeros are left out
    drops_zeros: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        """Raise AdapterUnsupported, with the way out, for anything that the program cannot compute exactly."""

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        """Write the folder, whole or not at all: PEFT's, unless the program has its own layout."""
        PeftFolder.write(contents, folder)

    @classmethod
    def program(cls, contents: Contents) -> tuple[str, ...]:
        """Return the words that start a server with the base, before `flags`; none without such a command."""
        return ()

    @classmethod
    def flags(cls, contents: Contents, name: str, folder: Path, rank: int) -> tuple[str, ...]:
        """Return the server's arguments."""
        return ()

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        """Return what a user must know about the folder, one sentence each."""
        return []


def module_names(layers: Mapping[str, Factors]) -> tuple[str, ...]:
    """Return the last steps of the layers' paths, such as q_proj, sorted; for an expert, those of its parameter."""
    return tuple(sorted({path_of(layer, factors).rpartition(".")[2] for layer, factors in layers.items()}))
