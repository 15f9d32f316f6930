"""The export of an average: each member as a folder of its own, and all of them as one adapter where they can be."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from loraweave import Composition, ScopeError, merge
from loraweave.extend.commands import require_one_adapter
from loraweave.extend.formats import ExportReport


def export_members(
    average: Composition, source: Path, folder: Path, **options: Any
) -> tuple[dict[str, ExportReport], list[str]]:
    """Export each member of an average that is one adapter, and all members merged into one where they can be.

    `source` is the folder that the average was saved to, `options` are those of `Composition.export`. Return the report of
    each folder written in `folder`, by its name (member-0 and so on, and merged), and notes on them for a person.
    """
    reports, notes = dict[str, ExportReport](), list[str]()
    shares = ", ".join(f"{name} ({member.share:g})" for name, member in average.members.items())
    notes.append(f"{source} averages the probabilities of {shares}: one adapter cannot do what all of them do")
    for number, (name, member) in enumerate(average.members.items()):
        place = f"member-{number}"
        if member.steps:
            try:
                require_one_adapter(source / place, "export", "--target", options["target"], "--out", str(folder / place))
            except ScopeError as error:
                notes.append(f"{name} was left out: {error}")
        elif member.is_base:
            notes.append(f"{name} is the base model itself, and needs no folder")
        else:
            reports[place] = member.export(folder / place, **options)
            notes.append(f"{name} is in {folder / place}")
    try:
        one = merge_members(average)
    except ScopeError as error:
        return reports, [*notes, f"nothing is merged: {error}"]
    reports["merged"] = one.export(folder / "merged", **options)
    losses = [fmean(composition.losses(one.task.examples)) for composition in (one, average)]
    told = f"loss {losses[0]:.3f} on the {len(one.task.examples)} examples, the average {losses[1]:.3f}"
    return reports, [*notes, f"all members as one adapter are in {folder / 'merged'}: {told}"]


def merge_members(average: Composition) -> Composition:
    """Return an average as one adapter, the sum of its members' updates by their shares.

    Raises ScopeError unless each member is one adapter and all ask by the same prompts, and what `lw.merge` raises.
    """
    members = average.members
    if not members or any(member.is_base or member.parts or member.router for member in members.values()):
        raise ScopeError("only an average whose members are adapters can be one adapter")
    tasks = [member.task for member in members.values()]
    if any(task != tasks[0] for task in tasks) or not tasks[0].examples:
        raise ScopeError("the members ask by different prompts, and one adapter can only be asked by one")
    total = sum(member.share for member in members.values())
    weights = [member.share / total for member in members.values()]
    adapters = [replace(member.adapter, name=name) for name, member in members.items()]
    merged = merge(adapters, weights, name="composition", allow_licenses=average.allow_licenses, progress=False)
    return replace(average, members={}, stored=merged, task=tasks[0], all_weights=average.mean_weights)
