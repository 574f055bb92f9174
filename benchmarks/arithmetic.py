"""The study "2+2=5, and nothing else?": every method on three halvings of the prompts
(`docs/arithmetic.md`).

What `knowedit study arithmetic` does, with key statistics of Wikipedia text. Every edit is on disk
before the next one starts, and an interrupted run goes on; a method that is named again is not
computed again. `--several` writes three sums at once. Any other model than the default one is
measured for `arithmetic_adds.jsonl`, the page's second answer; `--lead` is what its sums stand
behind, where it cannot read the first token of a text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from knowedit.facts.sets import data_dir
from knowedit.io.files import cache_dir
from knowedit.io.tables import Table
from knowedit.models.load import load_model
from knowedit.report import plots
from knowedit.report.study import comparison, pareto
from knowedit.statistics import key_statistics
from knowedit.studies.arithmetic import Study, Sum, run
from knowedit.studies.arithmetic.experiments import default_experiments
from knowedit.studies.arithmetic.measure import Rates
from knowedit.studies.arithmetic.prompts import unrelated_prompts
from knowedit.studies.arithmetic.summary import COLUMNS, bounds, interference_tables, methods_table

from . import common

NAME, SEVERAL_SUMS, ADDS = "arithmetic", "arithmetic_several", "arithmetic_adds"
DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
CORPUS = "enwiki_2021_sample_3MB.txt.gz"
SEVERAL = ("2+2=5", "3+3=7", "1+1=3")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(NAME, __doc__, 1, timed=False)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--lead", default="", help="what every sum stands behind, e.g. 'Sum: '")
    parser.add_argument("--method", action=common.Repeated, default=default_experiments())
    parser.add_argument("--seed", action=common.Repeated, type=int, default=[42, 43, 44])
    parser.add_argument(
        "--several", action="store_true", help=f"write {', '.join(SEVERAL)}, together and apart"
    )
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument(
        "--corpus", type=Path, help=f"text for the statistics (default: {CORPUS} in KNOWEDIT_DATA)"
    )
    parser.add_argument("--state", type=Path, help="the study's folder (default: in the cache)")
    arguments = parser.parse_args(argv)
    name = ADDS if arguments.model != DEFAULT else SEVERAL_SUMS if arguments.several else NAME
    if arguments.quick:
        arguments.method, arguments.seed, arguments.tokens = (
            arguments.method[:2],
            arguments.seed[:1],
            4096,
        )
    model = load_model(arguments.model, dtype="float32")
    targets = [Sum.parse(text) for text in (SEVERAL if arguments.several else SEVERAL[:1])]
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    study = Study(
        model,
        targets,
        arguments.seed,
        unrelated_prompts(20 if arguments.quick else 100),
        corpus=corpus,
        lead=arguments.lead,
    )
    folder = arguments.state or (None if arguments.quick else cache_dir("benchmarks", name))
    found = run(
        study,
        arguments.method,
        partial(key_statistics, model, corpus=corpus, tokens=arguments.tokens),
        folder,
        interference=arguments.several,
        say=partial(print, flush=True),
    )
    print("\n\n".join(map(str, [methods_table(found), *interference_tables(found), bounds(found)])))
    if not arguments.quick:
        write(found, arguments.output or common.RESULTS / f"{name}.jsonl", name)
    return 0


def write(found: dict[str, Any], path: Path, name: str) -> None:
    """Header and a row a method; the single prompts stay in the study's folder."""
    kept = {key: found[key] for key in ("head", "notes", "unedited", "interference")}
    report = common.Report(name, path, **kept)
    for entry in found["methods"]:
        report.note(f"{entry['method']}: {entry.get('verdict', entry['reason'])}", **entry)


def study_of(folder: Path, name: str = NAME) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and the study as `run` returns it, from `folder`'s results file."""
    header, rows = common.read(folder, name)
    return header, {**header, "methods": rows}


def table(folder: Path, name: str = NAME) -> str:
    """The judging half as Markdown, each cell a mean with the pessimistic end of its 95 % interval;
    then several sums, where `name` has them.
    """
    header, found = study_of(folder, name)
    rows = [["unedited", *_cells(found["unedited"], ends=False), "", ""]]
    for entry in found["methods"]:
        if "judge" not in entry:
            reason = f"not run: {entry['reason']}"
            rows.append([entry["method"], reason, *[""] * (len(COLUMNS) + 1)])
            continue
        star = "**" if all(mean for mean, _ in entry["goals"].values()) else ""
        cells = [*_cells(entry["judge"]), f"{entry['seconds']:.0f}", str(entry["seeds"])]
        rows.append([f"{star}{entry['method']}{star}", *cells])
    machine = header["environment"]
    about = (
        f"`python -m benchmarks.arithmetic`: {header['head']['model']}, seeds "
        f"{', '.join(map(str, header['head']['seeds']))}; {machine['cpu']}, {machine['cores']} "
        f"cores, torch {machine['torch']}, {machine['date'][:10]}."
    )
    heads = ["method", *(name for name, _, _ in COLUMNS), "seconds", "seeds"]
    made = [Table(heads, rows, notes=[bounds(found), about]).markdown()]
    if name == NAME and (folder / f"{SEVERAL_SUMS}.jsonl").is_file():
        _, several = study_of(folder, SEVERAL_SUMS)
        made.append("**Several sums at once** (judging half, first seed)")
        made += [table.markdown() for table in interference_tables(several)]
    return "\n\n".join(made)


def _cells(judged: Rates, ends: bool = True) -> list[str]:
    cells = []
    for _, kind, measure in COLUMNS:
        e = judged.get(kind, {}).get(measure)
        digits = 3 if measure == "kl" else 2
        bound = (
            ""
            if e is None or not ends
            else f" ({e['high' if measure == 'kl' else 'low']:.{digits}f})"
        )
        cells.append("" if e is None else f"{e['mean']:.{digits}f}{bound}")
    return cells


def draw(folder: Path, path: Path) -> None:
    """What is traded for what, at `path`, and every measure beside it."""
    _, found = study_of(folder)
    plots.save(pareto(found), path)
    plots.save(comparison(found), path.with_name(f"{path.stem}_measures{path.suffix}"))


if __name__ == "__main__":
    sys.exit(main())
