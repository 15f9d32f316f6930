"""How often the hub's checks for anomalies are right: on the example pool as it is, and with planted directions.

    python -m benchmarks anomalies               all sections, below 5 minutes on two idle cores
    python -m benchmarks anomalies --quick       a third of the adapters

Every adapter of --pool (33 of one base, rank 8, trained benignly) is compared with the others, as when it is added
last. A planted adapter is one of them with a random direction of rank 1 added to its update, whose norm is `strength` times
that of the layer's own update: the simplest form of a backdoor that was trained or merged into an adapter. Where: all 60
layers, ten of them, or one. "pruned" has the sum cut back to rank 8, so that the rank does not show. Near-duplicates are
adapters with noise on B; scaled and refactored ones are the same update in other factors.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import loraweave as lw
from benchmarks._run import Run, Table
from loraweave.extensions.trust.examiners.anomalies import against_pool
from loraweave.extensions.trust.figures import CODE_BITS, MAX_DISTANCE, NUM_PIECES, Figures, figures_of, hamming
from loraweave.hub.adapter import cosine
from loraweave.hub.adding import KINDS
from loraweave.lowrank.algebra import compress, norm

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
NOISES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
SPECTRAL = KINDS[:4]

app = typer.Typer()


@app.command()
def main(
    context: typer.Context, quick: Annotated[bool, typer.Option("--quick", help="A third of the adapters.")] = False
) -> None:
    """The tables of docs/anomalies.md."""
    run: Run = context.obj
    adapters = [lw.Adapter.from_pretrained(folder) for folder in run.adapters()]
    figures = [figures_of(adapter, adapter.base_model) for adapter in adapters]
    chosen = range(0, len(adapters), 3 if quick else 1)
    table = Table("as they are: false alarms", ("adapters", "flagged", *SPECTRAL))
    table.add(*row("the pool", [kinds(figures[index], others(figures, index)) for index in chosen]))
    run.show(table)
    for where, layers in (("all layers", 60), ("10 layers", 10), ("1 layer", 1)):
        table = Table(f"a direction planted in {where}: found", ("strength", "flagged", *SPECTRAL))
        for strength in STRENGTHS:
            for pruned in (False, True):
                found = []
                for index in chosen:
                    bad = planted(adapters[index], strength, layers, index, pruned=pruned)
                    found.append(kinds(figures_of(bad, bad.base_model), others(figures, index)))
                table.add(*row(f"{strength}{' pruned' if pruned else ''}", found))
        run.show(table)
    run.show(duplicates(adapters, figures, chosen))


def others(figures: list[Figures], index: int) -> list[Figures]:
    return [one for position, one in enumerate(figures) if position != index]


def kinds(own: Figures, pool: list[Figures]) -> set[str]:
    return {anomaly.kind for anomaly in against_pool(own, [(one.log_norm_L, one.dominance_L) for one in pool])}


def row(label: str, found: list[set[str]]) -> list[str]:
    """The label, the share with any finding, and that of each kind."""
    shares = [sum(bool(one) for one in found), *(sum(kind in one for one in found) for kind in SPECTRAL)]
    return [label, *(f"{share}/{len(found)}" for share in shares)]


def planted(adapter: lw.Adapter, strength: float, num_layers: int, seed: int, *, pruned: bool) -> lw.Adapter:
    """The adapter with a random direction of rank 1 in so many of its layers."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted(adapter.layers)
    hit = {names[(seed * 7 + step * (len(names) // num_layers)) % len(names)] for step in range(num_layers)}
    layers = dict(adapter.layers)
    for name in sorted(hit):
        own = layers[name]
        left_O1 = torch.randn(own.b_OR.shape[0], 1, generator=generator)
        right_1I = torch.randn(1, own.a_RI.shape[1], generator=generator)
        size = strength * norm(own) / float(left_O1.norm() * right_1I.norm())
        both = lw.Factors(torch.cat([own.a_RI, right_1I]), torch.cat([own.b_OR, size * left_O1], dim=1))
        layers[name] = compress(both, own.rank)[0] if pruned else both
    return lw.Adapter("planted", adapter.base_model, layers)


def duplicates(adapters: list[lw.Adapter], figures: list[Figures], chosen: range) -> Table:
    """How near-duplicates are found by their codes, and how near the codes of different adapters come."""
    table = Table("near-duplicates", ("noise on B", "least cosine", "bits that differ, at most", "found"))
    for noise in NOISES:
        cosines, distances, found = [], [], 0
        for index in chosen:
            bad = noisy(adapters[index], noise, index)
            code = figures_of(bad, bad.base_model).code
            cosines.append(cosine(adapters[index], bad)[0])
            distances.append(hamming(code, figures[index].code))
            found += distances[-1] <= MAX_DISTANCE and shares_a_piece(code, figures[index].code)
        table.add(str(noise), f"{min(cosines):.4f}", f"{max(distances)}/{CODE_BITS}", f"{found}/{len(cosines)}")
    pairs = [(left, right) for left in chosen for right in chosen if left < right]
    nearest = min(hamming(figures[left].code, figures[right].code) for left, right in pairs)
    most = max(cosine(adapters[left], adapters[right])[0] for left, right in pairs)
    table.add("other adapters", f"{most:.4f} at most", f"{nearest}/{CODE_BITS} at least", f"0/{len(pairs)}")
    return table


def noisy(adapter: lw.Adapter, noise: float, seed: int) -> lw.Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, own in adapter.layers.items():
        added_OR = torch.randn(own.b_OR.shape, generator=generator) * own.b_OR.square().mean().sqrt()
        # another factoring and another size of the same update besides, which must not matter
        layers[name] = lw.Factors(2 * own.a_RI.flip(0), 3 * (own.b_OR + noise * added_OR).flip(1))
    return lw.Adapter("noisy", adapter.base_model, layers)


def shares_a_piece(left: bytes, right: bytes) -> bool:
    size = len(left) // NUM_PIECES
    return any(left[start : start + size] == right[start : start + size] for start in range(0, len(left), size))
