"""Self-contained HTML pages, from one template: what an edit did, and what a folder of results
holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowedit.edits.edit import Edit
from knowedit.evaluation import Drift
from knowedit.evaluation.evaluation import Evaluation
from knowedit.io.files import atomic_file
from knowedit.io.lines import number_of
from knowedit.io.tables import Column, Table, figure
from knowedit.models.editable import EditableModel
from knowedit.report import plots
from knowedit.report.prompts import Prompts

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

#: What the template of an edit's page calls the two answers of a prompt.
ROLES = dict.fromkeys(("edited", "paraphrase", "consequence"), ("right", "wrong"))


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        blocks: tables, and paragraphs as text.
        figure: a picture above them.
        prompts: to be searched and filtered, below them.
        commands: to copy, below them, by the name of what they make.
        settings: records to copy, below those, by name.
    """

    title: str
    blocks: Sequence[Table | str]
    figure: Figure | None = None
    prompts: Prompts | None = None
    commands: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> Markup | None:
        """The figure as an SVG element."""
        from markupsafe import Markup

        return None if self.figure is None else Markup(plots.svg(self.figure))

    def text(self) -> str:
        """Title, blocks and commands as a terminal shows them; tables stand apart. Single prompts
        and settings are left to the page.
        """
        commands = [f"{name}: {command}" for name, command in self.commands.items()]
        blocks = [*self.blocks, *commands]
        return f"{self.title}\n\n{in_text(blocks)}" if blocks else ""

    def to_dict(self) -> dict[str, Any]:
        """Title, blocks and commands, JSON-ready: tables as records, paragraphs as text; without
        pictures.
        """
        blocks = [block if isinstance(block, str) else block.to_dict() for block in self.blocks]
        commands = {"commands": dict(self.commands)} if self.commands else {}
        return {"title": self.title, "blocks": blocks, **commands}

    def copies(self) -> dict[str, str]:
        """The settings as JSON to be read and copied."""
        return {name: json.dumps(record, indent=1) for name, record in self.settings.items()}


def in_text(blocks: Sequence[Table | str]) -> str:
    """Blocks one below the other, with an empty line around every table."""
    parts = [block if isinstance(block, str) else f"\n{block}\n" for block in blocks]
    return "\n".join(parts).strip("\n").replace("\n\n\n", "\n\n")


def write_sections(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page of `sections` to `path` in one step."""
    _write(path, "base.html.j2", title=title, sections=sections)


def write_page(
    path: Path,
    model: EditableModel,
    edit: Edit,
    measured: Evaluation,
    moved: Drift,
    shown: Sequence[tuple[int, str, str]],
    before: Mapping[str, str],
    after: Mapping[str, str],
    more: Sequence[Section] = (),
) -> None:
    """Write the page of one edit to `path` in one step.

    Args:
        shown: (record, role, prompt) of each row, `role` being "edited", "paraphrase" or
            "neighbour".
        before, after: the model's continuation of each prompt.
        more: what else there is to say, at the end.
    """
    rated = {(row["record"], row["prompt"]): row for row in measured.rows()}
    rows, last = [], None
    for record, role, prompt in shown:
        row = rated[record, prompt]
        rows.append(
            {
                "first": record != last,
                "role": role,
                "prompt": prompt,
                "said_before": before[prompt],
                "said_after": after[prompt],
                "before": _answers(row, role, "before"),
                "after": _answers(row, role, "after"),
            }
        )
        last = record
    where = f"On {moved.prompts} ordinary openings the most likely next word stayed the same in "
    mean, (at, largest) = figure(moved.kl, ".4f"), moved.worst
    far = f"mean divergence {mean} nats, largest {largest:.3f} at “{at}”."
    sections = [
        Section("Measured on all prompts of these facts", [measured.table()]),
        Section("What moved elsewhere", [f"{where}{moved.same:.0%}; {far}"]),
        Section("The edit", [_layers(edit, model)]),
        *more,
    ]
    _write(
        path,
        "edit.html.j2",
        title=f"{number_of(len(edit.facts), 'fact')} of {model.name}, edited and undone",
        method=edit.method_name,
        layers=[int(layer) for layer in edit.report.layers],
        rows=rows,
        sections=sections,
    )


def _answers(row: Mapping[str, Any], role: str, when: str) -> list[dict[str, Any]]:
    """Probability of the new and the old answer, as bars."""
    new, old = ROLES.get(role, ("wrong", "right"))
    found = [(name, row[f"p_{side}_{when}"]) for name, side in (("new", new), ("old", old))]
    return [
        {"role": name, "p": p, "width": round(max(2, 70 * p))} for name, p in found if p is not None
    ]


def _rank(edit: Edit, model: EditableModel, layer: int) -> int:
    """The rank of what an edit adds at a layer; that of each expert where it changes several."""
    inside = f"{model.layout.layer(layer)}."
    changes = edit.by_parameter(model).items()
    return max(change.rank or 0 for name, change in changes if name.startswith(inside))


def _layers(edit: Edit, model: EditableModel) -> Table:
    rows = [
        (
            layer,
            _rank(edit, model, int(layer)),
            chosen["gain"],
            edit.report.relative_norm[layer],
        )
        for layer, chosen in edit.report.layers.items()
    ]
    columns: list[Column | str] = [
        "layer",
        "rank",
        Column("gain", ".3f"),
        Column("|delta| / |W|", ".3f"),
    ]
    return Table(columns, rows, notes=[f"Note: {warning}." for warning in edit.warnings])


def rendered(template: str, **content: Any) -> str:
    """A template of this package, filled in; values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("knowedit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def _write(path: Path, template: str, **content: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(rendered(template, **content), encoding="utf-8")
