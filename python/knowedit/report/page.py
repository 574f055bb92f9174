"""One self-contained HTML page: what the model says before and after an edit, and what moved."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.evaluation import Drift
from knowedit.evaluation.measures.counterfact import Evaluation
from knowedit.io.files import atomic_file
from knowedit.models.editable import EditableModel

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --back: #fff;
  --new: #0b6e4f; --old: #b54708 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #344054; --back: #101828; --new: #32d583; --old: #fdb022 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } p, .soft { color: var(--soft) }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .35rem .6rem; vertical-align: top }
th { color: var(--soft); font-weight: 500 } tr.group > td { border-top: 1px solid var(--line) }
.bar { display: inline-block; height: .6rem; border-radius: .3rem; vertical-align: middle }
.new { background: var(--new) } .old { background: var(--old) } .num { font-variant-numeric: tabular-nums; white-space: nowrap }
.says { font-family: ui-monospace, monospace; font-size: .9rem }
"""  # noqa: E501


def write_page(
    path: Path,
    model: EditableModel,
    edit: Edit,
    measured: Evaluation,
    moved: Drift,
    shown: list[tuple[int, str, str]],
    before: dict[str, str],
    after: dict[str, str],
) -> None:
    """Write the page to `path` in one step.

    Args:
        shown: (record, role, prompt) of each row, `role` being "edited", "paraphrase" or
            "neighbour".
        before, after: the model's continuation of each prompt.
    """
    rated = {(row["record"], row["prompt"]): row for row in measured.rows()}
    rows, last = [], None
    for record, role, prompt in shown:
        row = rated[record, prompt]
        new, old = ("wrong", "right") if role == "neighbour" else ("right", "wrong")
        rows.append(
            f'<tr class="{"" if record == last else "group"}"><td '
            f'class="soft">{role}</td><td>{_text(prompt)}</td>'
            f'<td class="says">{_text(before[prompt])}</td><td '
            f'class="says">{_text(after[prompt])}</td>'
            f"<td>{_bars(row, new, old, 'before')}</td><td>{_bars(row, new, old, 'after')}</td></tr>"  # noqa: E501
        )
        last = record
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{len(edit.facts)} facts edited</title><style>{_STYLE}</style>
<h1>{len(edit.facts)} facts of {_text(model.name)}, edited and undone</h1>
<p>{_text(edit.method)}, layer(s) {", ".join(map(str, edit.factors))}. Bars show the probability of the
<span class="bar new" style="width:1rem"></span> new and the <span class="bar old" style="width:1rem"></span> old answer.</p>
<table><tr><th></th><th>prompt</th><th>before</th><th>after</th><th>before</th><th>after</th></tr>{"".join(rows)}</table>
<h2>Measured on all prompts of these facts</h2>{_measures(measured)}
<h2>What moved elsewhere</h2><p>On {moved.prompts} ordinary openings the most likely next word stayed the same in
{moved.same:.0%}; mean divergence {moved.kl:.4f} nats, largest {moved.worst[1]:.3f} at “{_text(moved.worst[0])}”.</p>
<h2>The edit</h2>{_layers(edit)}{"".join(f"<p>Note: {_text(w)}.</p>" for w in edit.warnings)}</html>
"""  # noqa: E501
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _bars(row: dict[str, Any], new: str, old: str, when: str) -> str:
    parts = []
    for role, colour in ((new, "new"), (old, "old")):
        p = row[f"p_{role}_{when}"]
        if p is not None:
            parts.append(
                f'<div class="num"><span class="bar {colour}" '
                f'style="width:{max(2, 70 * p):.0f}px"></span> {p:.2f}</div>'
            )
    return "".join(parts)


def _measures(measured: Evaluation) -> str:
    cells = []
    for kind, measures in measured.after.items():
        for measure, now in measures.items():
            was = measured.before[kind].get(measure)
            cells.append(
                f"<tr><td>{kind}</td><td>{measure}</td><td "
                f'class="num">{"" if was is None else f"{was.mean:.3f}"}</td>'
                f'<td class="num">{now.mean:.3f} <span class="soft">[{now.low:.3f}, '
                f"{now.high:.3f}]</span></td></tr>"
            )
    return (
        f"<table><tr><th></th><th>measure</th><th>before</th><th>after, 95 % "
        f"interval</th></tr>{''.join(cells)}</table>"
    )


def _layers(edit: Edit) -> str:
    cells = "".join(
        f'<tr><td>{layer}</td><td class="num">{edit.factors[int(layer)][0].shape[1]}</td>'
        f'<td class="num">{chosen["gain"]:.3f}</td><td '
        f'class="num">{edit.report["relative_norm"][layer]:.3f}</td></tr>'
        for layer, chosen in edit.report["layers"].items()
    )
    return (
        f"<table><tr><th>layer</th><th>rank</th><th>gain</th><th>|delta| / "
        f"|W|</th></tr>{cells}</table>"
    )
