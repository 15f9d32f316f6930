"""A study's files: tables as Markdown, CSV and LaTeX, plots, all answers, and one page that has everything."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from loraweave.extend import ShownTable, blank_figure
from loraweave.extensions.study.cells import write_whole
from loraweave.extensions.study.results import ALL, Figure, StudyResults

# the number of answers of a cell that the page shows; all are in answers.jsonl
NUM_SHOWN = 20
PLOTS = ("plot.png", "plot.svg")
NOTE = (
    "Values are means over seeds and test items. Shares of right answers have Wilson's 95 % interval, other values the "
    "central 95 % of 2,000 bootstrap draws, which resample seeds and items, the same for all methods. 'less' is the "
    "difference from the reference by these draws: where its interval leaves 0 out, the items tell the two apart. 'seconds' "
    "are those of making what answers. A dash is a method that a task cannot ask."
)


def write_report(results: StudyResults) -> None:
    """Write all files of the study's folder; the plots only if matplotlib is installed."""
    folder = results.folder
    columns = [column.name for column in fields(Figure)]
    rows = ([getattr(figure, name) for name in columns] for figure in results.figures)
    write_whole(folder / "table.md", markdown(results))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        ["" if value != value else value for value in row] for row in (columns, *rows)
    )
    write_whole(folder / "table.csv", table.getvalue())
    write_whole(folder / "table.tex", latex(results))
    write_whole(folder / "answers.jsonl", _answers(results))
    write_whole(folder / "failures.json", json.dumps(dict(results.failures), indent=1, ensure_ascii=False))
    drawn = draw(results, folder) if results.figures and find_spec("matplotlib") else ""
    write_whole(folder / "report.html", page(results, drawn))


def markdown(results: StudyResults) -> str:
    """Return the results as Markdown tables, one for each metric and number of examples."""
    parts = []
    for title, columns, rows in results.tables():
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
        written = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        parts.append(f"### {title}\n\n{written}\n")
    return "\n".join([*parts, *([f"{NOTE}\n"] if parts else [])])


def latex(results: StudyResults) -> str:
    """Return the results as LaTeX tables for booktabs; the best value of each column is bold."""
    parts = ["% \\usepackage{booktabs}"]
    for title, columns, rows in results.tables():
        best = _best(columns, rows, lower=title.startswith("perplexity"))
        lines = []
        for number, row in enumerate(rows):
            cells = [_tex(cell) for cell in row]
            cells = [f"\\textbf{{{cell}}}" if best.get(place) == number else cell for place, cell in enumerate(cells)]
            lines.append(" & ".join(cells) + " \\\\")
        head = " & ".join(map(_tex, columns)) + " \\\\"
        kinds = "l" + "r" * (len(columns) - 1)
        body = "\n".join(lines)
        parts.append(
            f"\\begin{{table}}\n\\caption{{{_tex(title)}}}\n\\begin{{tabular}}{{{kinds}}}\n\\toprule\n{head}\n\\midrule\n"
            f"{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}"
        )
    return "\n\n".join(parts) + "\n"


def draw(results: StudyResults, folder: Path) -> str:
    """Draw plot.png and plot.svg, with a panel for each task and one for the mean of all; return the SVG as text.

    With one number of examples a method is a point and an interval, with several a curve over them.
    """
    metric = results.study.used_metrics[0]
    figures = [figure for figure in results.figures if figure.metric == metric.name]
    tasks = sorted(dict.fromkeys(figure.task for figure in figures), key=lambda task: task != ALL)
    if len(tasks) == 2:
        tasks = tasks[1:]
    methods = [method.name for method in results.study.methods]
    curves = len(results.study.shots) > 1
    # four panels fill two rows of two
    across, tall = 2 if len(tasks) == 4 else min(3, len(tasks)), 0.32 * len(methods) + 1.1 if not curves else 3.2
    down = -(-len(tasks) // across)
    plot = blank_figure("the plots of a study", figsize=(3.4 * across + 1.6, tall * down), layout="constrained")
    panels = plot.subplots(down, across, squeeze=False, sharex=not curves, sharey=True).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        _draw_panel(
            panel, [figure for figure in figures if figure.task == task], methods, results.study.shots, metric.percent
        )
        panel.set_title(task, fontsize=9, loc="left")
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    if curves:
        plot.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    (plot.supylabel if curves else plot.supxlabel)(metric.name + (" (%)" if metric.percent else ""), fontsize=9)
    written = io.StringIO()
    # without a date the same figures are the same file
    plot.savefig(written, format="svg", metadata={"Date": None})
    picture = io.BytesIO()
    plot.savefig(picture, format="png", dpi=150)
    write_whole(folder / PLOTS[1], written.getvalue())
    (folder / PLOTS[0]).write_bytes(picture.getvalue())
    return written.getvalue()


def _draw_panel(panel: Any, figures: Sequence[Figure], methods: Sequence[str], shots: Sequence[int], percent: bool) -> None:
    scale = 100 if percent else 1
    panel.grid(axis="y" if len(shots) > 1 else "x", linewidth=0.4, alpha=0.6)
    # also above an empty panel
    panel.tick_params(labelsize=8, labelbottom=True)
    for place, method in enumerate(methods):
        shown = [figure for figure in figures if figure.method == method]
        values = [scale * figure.value for figure in shown]
        # a percentile of few items can lie on the other side of the value
        below = [max(0.0, scale * (figure.value - figure.low)) for figure in shown]
        reach = below, [max(0.0, scale * (figure.high - figure.value)) for figure in shown]
        if len(shots) > 1:
            panel.errorbar(
                [figure.shots for figure in shown], values, yerr=reach, label=method, marker="o", markersize=3, linewidth=1
            )
        else:
            panel.errorbar(values, [place] * len(shown), xerr=reach, fmt="o", markersize=4, color=f"C{place % 10}")
    if len(shots) > 1:
        panel.set_xticks(list(shots))
    else:
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.5, -0.5)


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { svg { filter: invert(.9) hue-rotate(180deg) } }
td { white-space: pre-wrap }
.wrong { color: #b3261e } summary { cursor: pointer }
</style></head><body>
<h1>$title</h1>
<p>$summary</p>
$failures
$plot
<p>$told</p>
$tables
<p>$note</p>
<h2>Answers</h2>
<p>The first $num of each; answers.jsonl has all.</p>
$answers
</body></html>
""")


def page(results: StudyResults, plot: str) -> str:
    """Return an HTML page that loads no other file, with all names and answers escaped."""
    study = results.study
    items = ", ".join(f"{len(task.test)} test items of {task.name}" for task in study.tasks)
    versions = ", ".join(f"{name} {version(name)}" for name in ("loraweave", "torch", "transformers"))
    summary = (
        f"{len(study.methods)} methods on {len(study.tasks)} tasks, {', '.join(map(str, study.shots))} examples, seeds "
        f"{', '.join(map(str, study.seeds))}; {items}; base model {study.base or 'as given'}; "
        f"{_measured(results)}written on {date.today()} with {versions}."
    )
    failed = ShownTable.of(("failed", "why"), results.failures.items())._repr_html_() if results.failures else ""
    return PAGE.substitute(
        title=escape(f"Study: {results.folder.resolve().name}"),
        summary=escape(summary),
        failures=failed,
        plot=plot[plot.find("<svg") :] if plot else "",
        told=escape(told_apart(results)),
        tables="".join(_html_table(*table) for table in results.tables()),
        note=escape(NOTE),
        num=NUM_SHOWN,
        answers="".join(_shown_answers(results)),
    )


def _measured(results: StudyResults) -> str:
    """Return the first and the last day on which answers of the study were measured, or "" without answers."""
    days = sorted({answers.measured for answers in results.answers.values()})
    if not days:
        return ""
    return f"measured on {days[0]}, " if len(days) == 1 else f"measured from {days[0]} to {days[-1]}, "


def told_apart(results: StudyResults) -> str:
    """Return a sentence that names the methods whose difference from the reference has an interval without 0."""
    study, metric = results.study, results.study.used_metrics[0].name
    figures = [figure for figure in results.figures if (figure.shots, figure.metric) == (study.shots[0], metric)]
    task = ALL if any(figure.task == ALL for figure in figures) and len(study.tasks) > 1 else study.tasks[0].name
    compared = [figure for figure in figures if figure.task == task and figure.difference == figure.difference]
    above = [figure.method for figure in compared if figure.difference_low > 0]
    below = [figure.method for figure in compared if figure.difference_high < 0]
    alike = [figure.method for figure in compared if figure.method not in (*above, *below)]
    parts = [
        f"{', '.join(names)} {relation}"
        for names, relation in ((above, "above"), (below, "below"), (alike, "not told apart from it"))
        if names
    ]
    return f"{metric}, {study.shots[0]} examples, against {study.reference}: {'; '.join(parts) or 'nothing to compare'}."


def _html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a titled HTML table, its rows sorted by the first column of values, with the best of each column in bold."""
    lower = title.startswith("perplexity")

    def order(row: Sequence[str]) -> float:
        return float("inf") if row[1] == "-" else (1 if lower else -1) * float(row[1].split()[0])

    ordered = sorted(rows, key=order) if len(columns) > 3 else list(rows)
    best = _best(columns, ordered, lower=lower)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for number, row in enumerate(ordered):
        tags = ["strong" if best.get(place) == number else "span" for place in range(len(row))]
        cells = "".join(f"<td><{tag}>{escape(cell)}</{tag}></td>" for tag, cell in zip(tags, row, strict=True))
        body += f"<tr>{cells}</tr>"
    return f"<h2>{escape(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown_answers(results: StudyResults) -> list[str]:
    """Return an HTML table of the first answers of each task and method, for the first number of examples and seed."""
    seen, parts = set(), []
    for cell, answers in results.answers.items():
        if (cell.task.name, cell.method.name) in seen:
            continue
        seen.add((cell.task.name, cell.method.name))
        rows = []
        for (text, accepted), answer in list(zip(cell.task.test, answers.answers, strict=True))[:NUM_SHOWN]:
            wrong = "" if answer.strip() in [target.strip() for target in accepted] else ' class="wrong"'
            cells = escape(str(text)), escape(answer), escape(" / ".join(accepted))
            rows.append(f"<tr><td>{cells[0]}</td><td{wrong}>{cells[1]}</td><td>{cells[2]}</td></tr>")
        head = "<tr><th>input</th><th>answer</th><th>accepted</th></tr>"
        parts.append(f"<details><summary>{escape(str(cell))}</summary><table>{head}{''.join(rows)}</table></details>")
    return parts


def _best(columns: Sequence[str], rows: Sequence[Sequence[str]], *, lower: bool) -> dict[int, int]:
    """Return {column: row} of the best value in each column of values; `lower` says that less is better."""
    best = {}
    for place in range(1, len(columns) - 2):
        numbers = {number: float(row[place].split()[0]) for number, row in enumerate(rows) if row[place] != "-"}
        if numbers:
            best[place] = (min if lower else max)(numbers, key=lambda number: numbers[number])
    return best


NAMED = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
TEX = str.maketrans({**{character: f"\\{character}" for character in "&%$#_{}"}, **NAMED})


def _tex(text: str) -> str:
    return text.translate(TEX)


def _answers(results: StudyResults) -> str:
    rows = [
        {**cell.named, "input": str(text), "targets": accepted, "answer": answer, "loss": loss}
        for cell, answers in results.answers.items()
        for (text, accepted), answer, loss in zip(cell.task.test, answers.answers, answers.losses, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
