"""`loraweave serve`: our server."""

from __future__ import annotations

from typing import Annotated

import typer

from loraweave.cli._application import DEFAULT_HUB, BaseOption, DtypeOption, HubOption, app
from loraweave.cli._inputs import load_model, open_hub
from loraweave.errors import PackageMissing


@app.command(epilog='Example: loraweave serve --hub adapters   (a client then asks for model "1.1*passive + 0.9*negation")')
def serve(
    hub: HubOption = DEFAULT_HUB,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    host: Annotated[str, typer.Option(help="Where to listen; other machines need --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAWEAVE_API_KEY", help="What clients must send as their bearer token.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs, such as cuda; where it is loaded by default.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that run in one batch.")] = 8,
    cache_tokens: Annotated[int, typer.Option(min=1, help="Keys and values that the batch keeps at most.")] = 32_768,
    prefix_bytes: Annotated[int, typer.Option(min=0, help="Bytes of prompts that are not read twice.")] = 1 << 28,
    waiting: Annotated[int, typer.Option(min=1, help="Answers that wait; more are refused with 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one answer at most.")] = 1024,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    token_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds that a token of a running answer may take; more answers wait.")
    ] = None,
    memory_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes for keys and values, kept prompts, and adapters together; no limit by default."),
    ] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters of one formula at most.")] = 16,
    loaded: Annotated[int, typer.Option(min=1, help="Adapters, and formulas with theirs, that stay in memory unused.")] = 64,
    merges: Annotated[bool, typer.Option(help="Whether formulas may have merges by a method, such as ties(a, b).")] = True,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Answers have the same bits whatever runs beside them; slower.")
    ] = False,
) -> None:
    """Serve every formula over a hub to OpenAI clients, requests with different mixtures in one batch."""
    try:
        import uvicorn  # noqa: F401

        from loraweave.serving.app import make_server
        from loraweave.serving.limits import Limits
    except ModuleNotFoundError as error:
        raise PackageMissing(
            f"serving needs packages that are not installed ({error}): pip install 'loraweave[serve]'"
        ) from error

    limits = Limits(
        rows=rows,
        cache_tokens=cache_tokens,
        prefix_bytes=prefix_bytes,
        waiting=waiting,
        new_tokens=max_tokens,
        seconds=deadline,
        token_seconds=float("inf") if token_seconds is None else token_seconds,
        memory_bytes=float("inf") if memory_bytes is None else memory_bytes,
        adapters=adapters,
        loaded=loaded,
        merges=merges,
        batch_invariant=batch_invariant,
    )
    with open_hub(hub) as opened:
        model, tokenizer = load_model(base, dtype)
        if device is not None:
            model.to(device)
        make_server(opened, model, tokenizer, host=host, port=port, limits=limits, api_key=api_key).run()
