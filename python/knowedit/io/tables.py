"""One table for every figure that is shown: terminal text, Markdown, HTML, LaTeX, JSON and CSV from
the same values.

It stands below the wings that measure, so that a result can print itself; pages and pictures are in
`knowedit.report`.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Align = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        header: its heading.
        format: a format specification, such as ".3f"; applied to every value but text. Values bring
            their own `__format__`: an `Estimate` in ".3f" shows its interval too.
        align: None: right when the column has a number, else left.
        code: in a fixed-width font, where pages have another.
    """

    header: str
    format: str = ""
    align: Align | None = None
    code: bool = False

    def show(self, value: Any) -> str:
        """A value as text; None and NaN, which stand for "undefined", are empty."""
        if isinstance(value, str):
            return value
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return figure(value, self.format)


def figure(value: Any, spec: str) -> str:
    """A number as `spec` formats it, without the minus of what rounds to zero: -4e-9 in ".3f" is
    0.000. Anything else as it formats itself.
    """
    text = format(value, spec)
    rounds_to_zero = isinstance(value, float) and re.fullmatch(r"-0(\.0*)?%?", text.strip())
    return text.replace("-", "", 1) if rounds_to_zero else text


@dataclass(frozen=True)
class Table:
    """Rows of values under columns.

    Attributes:
        columns: headings alone, or `Column`s.
        rows: a value a column: text, a number, an `Estimate`, None for an empty cell. Text may have
            several lines.
        title: above the table; notes: sentences below it.

    Raises:
        ValueError: a row has more or fewer values than there are columns.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        columns = [Column(c) if isinstance(c, str) else c for c in self.columns]
        object.__setattr__(self, "columns", columns)
        for row in self.rows:
            if len(row) != len(columns):
                raise ValueError(f"{len(columns)} columns, but a row of {len(row)}: {row}")

    @classmethod
    def from_columns(
        cls,
        head: str,
        names: Iterable[str],
        columns: Iterable[tuple[str, Iterable[Any]]],
        **others: Any,
    ) -> Table:
        """A table whose records stand side by side: `names` of the rows under `head`, then each
        record, its heading and its values.
        """
        headed = [(heading, list(values)) for heading, values in columns]
        rows = [*zip(names, *(values for _, values in headed))]
        return cls([head, *(heading for heading, _ in headed)], rows, **others)

    @property
    def heads(self) -> list[Column]:
        """The columns, each a `Column`."""
        return list(self.columns)  # type: ignore[arg-type]  # made so by __post_init__

    def cells(self) -> list[list[str]]:
        """Every value as text."""
        return [[c.show(value) for c, value in zip(self.heads, row)] for row in self.rows]

    def alignment(self) -> list[Align]:
        """Each column's side."""
        return [
            column.align or ("right" if any(_is_figure(row[i]) for row in self.rows) else "left")
            for i, column in enumerate(self.heads)
        ]

    def rich(self) -> RichTable:
        """As rich draws it, without title and notes."""
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column, side in zip(self.heads, self.alignment()):
            made.add_column(Text(column.header), justify=side, overflow="fold")
        for row in self.cells():
            made.add_row(*map(Text, row))
        return made

    def without_empty_columns(self) -> Table:
        """The same without the columns that have no value at all."""
        kept = [i for i in range(len(self.heads)) if any(row[i] for row in self.cells())]
        columns = [self.heads[i] for i in kept]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=columns, rows=rows)

    def text(self, width: int | None = None) -> str:
        """As a terminal shows it, without colours.

        Args:
            width: characters a line, at which cells are folded; None: as wide as it needs.
        """
        from rich.console import Console

        out = io.StringIO()
        console = Console(
            file=out,
            width=width or 100_000,
            color_system=None,
            force_terminal=False,
            soft_wrap=False,
        )
        console.print(self.rich())
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    def __str__(self) -> str:
        return self.text()

    def markdown(self) -> str:
        """A GitHub table, its title in bold above it and the notes below."""
        rule = {"left": "---", "right": "---:"}
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append(_piped(column.header for column in self.heads))
        lines.append("|" + "|".join(rule[side] for side in self.alignment()) + "|")
        for row in self.cells():
            marks = ("`" if column.code else "" for column in self.heads)
            lines.append(_piped(f"{mark}{cell}{mark}" for mark, cell in zip(marks, row)))
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)

    def html(self) -> str:
        """An HTML element, escaped; cells with figures have the class "num",
        those in a fixed-width font "code". With more than four columns of intervals these stand
        below their means, and the table is of the class "dense".
        """
        spans = [any(is_dataclass(row[i]) for row in self.rows) for i in range(len(self.heads))]
        dense = sum(spans) > 4
        kinds = [
            ' class="code"' if column.code else ' class="num"' if side == "right" else ""
            for column, side in zip(self.heads, self.alignment())
        ]

        def line(tag: str, values: Iterable[str]) -> str:
            shown = (
                v.replace(" [", "\n[") if dense and span else v for v, span in zip(values, spans)
            )
            cells = (f"<{tag}{k}>{html.escape(v)}</{tag}>" for k, v in zip(kinds, shown))
            return f"<tr>{''.join(cells)}</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        head = line("th", (column.header for column in self.heads))
        body = "\n".join(line("td", row) for row in self.cells())
        look = ' class="dense"' if dense else ""
        notes = "".join(f'\n<p class="note">{html.escape(note)}</p>' for note in self.notes)
        return (
            f'<div class="scroll"><table{look}>{caption}<thead>{head}</thead>\n'
            f"<tbody>{body}</tbody></table></div>{notes}"
        )

    def __html__(self) -> str:
        """What a template's `{{ table }}` inserts."""
        return self.html()

    def latex(self) -> str:
        """A `tabular` with the rules of the package booktabs; an interval stands small behind its
        mean. Title and notes are comments.
        """
        sides = "".join(side[0] for side in self.alignment())
        texts = ([column.header for column in self.heads], *self.cells())
        rows = (" & ".join(map(_in_latex, row)) for row in texts)
        # behind a rule or a line's end a bracket would be the space to leave, a star a variant
        line, *body = (("{}" if row.startswith(("[", "*")) else "") + row + r" \\" for row in rows)
        said = [f"% {' '.join(text.split())}" for text in (self.title, *self.notes) if text]
        inner = [r"\toprule", line, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*said, rf"\begin{{tabular}}{{{sides}}}", *inner, r"\end{tabular}"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: title, notes, headings, and the values themselves; None where undefined."""
        rows = [[_plain(value) for value in row] for row in self.rows]
        columns = [column.header for column in self.heads]
        return {"title": self.title, "columns": columns, "rows": rows, "notes": [*self.notes]}

    def csv(self) -> str:
        """Comma-separated values (RFC 4180) with a line of headings. An `Estimate` is its mean,
        followed by columns for the ends of its interval.
        """
        spans = [any(is_dataclass(row[i]) for row in self.rows) for i in range(len(self.heads))]
        out = io.StringIO()
        writer = csv.writer(out)
        heads = (
            [c.header, f"{c.header} low", f"{c.header} high"] if span else [c.header]
            for c, span in zip(self.heads, spans)
        )
        writer.writerow([name for group in heads for name in group])
        for row in self.rows:
            parts = [_ends(_plain(v)) if span else [_plain(v)] for v, span in zip(row, spans)]
            writer.writerow([value for part in parts for value in part])
        return out.getvalue()


#: What LaTeX reads as something else, and how it is written.
_ESCAPED = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_INTERVAL = re.compile(r"(-?[\d.]+%?) (\[-?[\d.]+%?, -?[\d.]+%?\])")


def _in_latex(text: str) -> str:
    """A cell; the minus of a number is one, and its lines are one."""
    span = _INTERVAL.fullmatch(text)
    shown = "".join(_ESCAPED.get(sign, sign) for sign in " ".join(text.split()))
    if span is not None:
        mean, ends = ("".join(_ESCAPED.get(sign, sign) for sign in part) for part in span.groups())
        shown = rf"{mean} {{\footnotesize {ends}}}"
    return re.sub(r"(?<![\w.])-(?=[\d.])", "$-$", shown)


def _is_figure(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, bool))


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in vars(value).items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _ends(value: Any) -> list[Any]:
    return (
        [value[k] for k in ("mean", "low", "high")] if isinstance(value, dict) else [value, "", ""]
    )


def _piped(cells: Iterable[str]) -> str:
    shown = ("<br>".join(cell.replace("|", "\\|").splitlines()) for cell in cells)
    return f"| {' | '.join(shown)} |"
