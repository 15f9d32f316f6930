"""Flags that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

HubOption = Annotated[
    str, typer.Option("--hub", envvar="LORAWEAVE_HUB", metavar="PLACE", help="The hub: a folder, or postgresql://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
AnomaliesOption = Annotated[
    str, typer.Option(metavar="POLICY", help="What looks wrong about an adapter: off, report, quarantine or refuse.")
]
AllowLicensesOption = Annotated[
    bool, typer.Option("--allow-licenses", help="Also where licenses are known to exclude each other, or derived works.")
]
BlobsOption = Annotated[
    str | None,
    typer.Option(envvar="LORAWEAVE_BLOBS", metavar="PLACE", help="Where a new hub keeps its files: a folder, or s3://..."),
]
DEFAULT_HUB = "adapters"
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Base model: a folder or hub id; the embedded one by default.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="What the base is computed in: float32, bfloat16, float16, or fast, which is bfloat16 where this machine "
        "multiplies it faster. By default the checkpoint's own, float32 for the embedded one.",
    ),
]
OptionOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="A setting of the method; may be repeated.")
]
InstructionOption = Annotated[str | None, typer.Option(help="What the task asks for; from the rows when they agree on one.")]
SystemOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Ask in the base's chat template, after this turn of the system's, '' for none; rows of messages do so anyway.",
    ),
]
LabelsOption = Annotated[str | None, typer.Option(metavar="A,B", help="The only possible answers, separated by commas.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
ManyTagsOption = Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be given several times.")]
ExactRankOption = Annotated[int | None, typer.Option(min=1, help="Cut every layer to this rank; exact by default.")]
