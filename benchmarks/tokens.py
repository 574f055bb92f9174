"""Edit quality against the tokens of the statistics: how many are enough for MEMIT, and how many
for AlphaEdit?

The statistics of a few tokens are the first part of those of many, so one pass is stored at every
count. Values do not depend on statistics and are optimised once; then each count gives a batch edit
of the same facts by each method, measured on all their prompts. Beside it stand the estimated
errors of C^-1 k and of the null space, as `knowedit.statistics.convergence` has them, and the price
of the edit under the statistics of the most tokens: the mean square of what it adds to ordinary
keys.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import summarise
from knowedit.evaluation.measures.base import ask, questions
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import MEMIT, AlphaEdit, Recipe
from knowedit.methods.locate.keys import group_by_subject
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics, convergence
from knowedit.statistics.corpus.batching import Piece
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.corpus.windows import Reader, prefetch
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics
from knowedit.statistics.sums import Sums

from . import common
from .statistics import CORPUS

COUNTS = (1_536, 3_072, 6_144, 12_288, 24_576, 49_152, 98_304, 196_608, 393_216, 500_000)
METHODS: tuple[type[Recipe], ...] = (MEMIT, AlphaEdit)
KEPT = (
    ("efficacy", "success"),
    ("efficacy", "exact"),
    ("paraphrase", "success"),
    ("neighbourhood", "success"),
    ("neighbourhood", "unchanged"),
)


def prefixes(
    model: EditableModel, corpus: Path, layers: Sequence[int], counts: Sequence[int]
) -> Iterator[tuple[int, KeyStatistics]]:
    """Statistics of the first tokens of a corpus, for each of the ascending `counts`, in one pass.

    Both halves of each count are estimated: `extra["convergence"]` holds one check, null space
    included.
    """
    sums = Sums(model, layers, "exact")
    probes = convergence.probe_keys(model, layers)
    halves, done, left = [0, 0], 0, list(counts)
    texts = Corpus.parse(corpus)
    with prefetch(Reader(texts, 0, model.tokenizer, 512, True), 0, (), worker=False) as source:
        for window in source:
            pieces = window.pieces
            while left and done + sum(piece.count for piece in pieces) >= left[0]:
                now, pieces = _split(pieces, left[0] - done)
                sums.add(window.number % 2, now)
                halves[window.number % 2] += left[0] - done
                done = left.pop(0)
                yield done, _statistics(model, texts, sums, halves, probes)
            sums.add(window.number % 2, pieces)
            halves[window.number % 2] += sum(piece.count for piece in pieces)
            done += sum(piece.count for piece in pieces)
            if not left or not window.documents:
                return


def _split(pieces: Sequence[Piece], count: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces with the first `count` keys, and pieces with the others (a cut one is run again for
    the rest of it).
    """
    first: list[Piece] = []
    for i, piece in enumerate(pieces):
        if count < piece.count:
            first += [Piece(piece.ids[: piece.skip + count], piece.skip)] if count else []
            return first, [Piece(piece.ids, piece.skip + count), *pieces[i + 1 :]]
        first.append(piece)
        count -= piece.count
    return first, []


def _statistics(
    model: EditableModel, corpus: Corpus, sums: Sums, halves: Sequence[int], probes: Any
) -> KeyStatistics:
    found, count = {}, sum(halves)
    for layer in sums.layers:
        parts = [sums.moment(half, layer).sum() for half in (0, 1)]
        checks = []
        if convergence.enough_tokens(halves, model.d_ff):
            errors = convergence.compare_halves(parts, halves, probes[layer], null_space=True)
            checks = [convergence.record(count, {layer: errors}, layer)]
        recipe = CollectionRecipe(model.fingerprint, corpus.identity, count, 512, True, 0)
        norms = sums.tally.norms[str(layer)]
        found[layer] = LayerStatistics(
            layer,
            model.layout.projection(layer),
            model.name,
            recipe,
            count,
            parts[0] + parts[1],
            norms[0] / max(norms[1], 1),
            norms[2] / max(norms[3], 1),
            {"convergence": checks},
        )
    return KeyStatistics(found)


def run(
    report: common.Report,
    model: EditableModel,
    corpus: Path,
    facts: Sequence[Any],
    counts: Sequence[int],
    methods: Sequence[type[Recipe]] = METHODS,
) -> list[dict[str, Any]]:
    """A row for every method and count; returns them."""
    editors = [method() for method in methods]
    groups = group_by_subject(list(facts), True)
    asked = [q for record, fact in enumerate(facts) for q in questions(record, fact)]
    before, rng = ask(model, asked, progress=False), np.random.default_rng(0)
    layers = editors[0].statistics_layers(model)
    stored = {}
    for count, found in prefixes(model, corpus, layers, counts):
        stored[count] = found
        checks = {layer: found[layer].extra["convergence"] for layer in layers}
        report.note(
            f"{count:>9,} tokens summed", case="statistics", tokens=count, convergence=checks
        )
    most = stored[max(stored)]
    rows = []
    first = editors[0]
    targets = first.target.values(first.prepare(model, groups, most, progress=False))
    for editor in editors:
        for count in counts:
            row: dict[str, Any] = {"case": editor.name, "tokens": count}
            check: dict[str, Any] = (
                next(iter(stored[count][layers[0]].extra["convergence"]), {})
                if count in stored
                else {}
            )
            row |= {name: check[name][0] for name in ("solve", "null_space") if name in check}
            try:
                task = editor.prepare(model, groups, stored[count], progress=False)
                edit = editor.finish(task, targets)
            except (KnowEditError, KeyError) as error:
                report.note(
                    f"{editor.name:10} {count:>9,} tokens  refused: {error}",
                    refused=str(error),
                    **row,
                )
                continue
            with edit.applied_to(model):
                after = summarise(asked, ask(model, asked, progress=False), rng, before)
            row |= {
                f"{kind} {measure}": after[kind][measure].mean
                for kind, measure in KEPT
                if kind in after
            }
            row["price"] = sum(
                float(
                    (
                        (v.T.double() @ most.moment(layer) @ v.double())
                        * (u.T.double() @ u.double())
                    ).sum()
                )
                for layer in edit.keys
                for u, v in [edit.changes[model.layout.weight_name(layer)].raw]
            )
            figures = "  ".join(
                f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float)
            )
            report.note(f"{editor.name:10} {count:>9,} tokens  {figures}", **row)
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a method and number of tokens."""
    names = [f"{kind} {measure}" for kind, measure in KEPT]
    lines = []
    for row in rows:
        cells = [f"{row[name]:.3f}" if name in row else "-" for name in names]
        errors = [f"{row[name]:.1%}" if name in row else "-" for name in ("solve", "null_space")]
        lines.append([row["case"], f"{row['tokens']:,}", *cells, f"{row['price']:.3g}", *errors])
    heads = ["method", "tokens", *names, "price", "C⁻¹k ±", "null space ±"]
    return Table(heads, lines).markdown()


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality and estimated errors against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        mine = [row for row in rows if row["case"] == case]
        for (kind, measure), style in zip(KEPT, ("-", ":", "--", "-.", (0, (1, 3)))):
            points = [
                (row["tokens"], row[name]) for row in mine if (name := f"{kind} {measure}") in row
            ]
            if points:
                left.plot(
                    *zip(*points),
                    linestyle=style,
                    marker=".",
                    color=f"C{number}",
                    label=f"{case}: {kind} {measure}",
                )
        right.plot(
            [r["tokens"] for r in mine],
            [r["price"] / mine[-1]["price"] for r in mine],
            ".-",
            color=f"C{number}",
            label=f"{case}: price over that at the most tokens",
        )
    for name, style in (("solve", "k-"), ("null_space", "k--")):
        points = sorted({(row["tokens"], row[name]) for row in rows if name in row})
        if points:
            right.plot(
                *zip(*points), style, marker=".", label=f"estimated error, {name.replace('_', ' ')}"
            )
    left.set(xscale="log", xlabel="tokens", ylabel="share of prompts")
    right.set(xscale="log", yscale="log", xlabel="tokens")
    left.legend(fontsize="x-small")
    right.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("tokens", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--limit",
        type=int,
        default=48,
        help="facts of CounterFact's held-out records, in one batch",
    )
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument(
        "--tokens", action=common.Repeated, type=int, default=COUNTS, help="ascending"
    )
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument(
        "--picture", type=Path, default=common.HERE.parent / "docs" / "pictures" / "tokens.png"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw, and print the table, from the results file"
    )
    arguments = parser.parse_args(argv)
    if arguments.draw:
        source = arguments.output or common.RESULTS / "tokens.jsonl"
        rows = [row for row in map(json.loads, source.read_text().splitlines()) if "price" in row]
        draw(rows, arguments.picture)
        print(table(rows))
        return 0
    facts, counts = load("counterfact")[-100:][: arguments.limit], tuple(arguments.tokens)
    if arguments.quick:
        facts, counts = facts[:3], counts[:3]
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    model = load_model(arguments.model, dtype=arguments.dtype)
    report = common.report(
        "tokens",
        arguments,
        model=model.name,
        dtype=arguments.dtype,
        corpus=corpus.name,
        facts=len(facts),
    )
    rows = run(report, model, corpus, facts, counts)
    print(table(rows))
    if not arguments.quick:
        draw(rows, arguments.picture)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
