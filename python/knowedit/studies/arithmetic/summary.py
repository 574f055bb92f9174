"""The study in words: which goals a method meets, its verdict, the table of all methods, and the
written summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knowedit.io.tables import Column, Table
from knowedit.studies.arithmetic.measure import GOAL, Rates, reached

#: Columns of the table: heading, kind and measure.
COLUMNS = (
    ("target", "target", "success"),
    ("paraphrase", "paraphrase", "success"),
    ("… longer", "paraphrase", "longer"),
    ("locality", "unrelated", "identical"),
    ("… steady", "unrelated", "steady"),
    ("sums same", "sums", "identical"),
    ("… clear", "sums", "clear"),
    ("… steady", "sums", "steady"),
    ("accuracy", "sums", "accuracy"),
    ("KL sums", "sums", "kl"),
    ("KL other", "unrelated", "kl"),
)
NAMES = {
    ("target", "success"): "target",
    ("paraphrase", "success"): "paraphrase",
    ("unrelated", "identical"): "locality",
    ("sums", "clear"): "clear sums",
    ("sums", "steady"): "steady sums",
    ("sums", "kl"): "KL on sums",
}


def goals(judged: Rates) -> dict[str, list[bool]]:
    """Each goal by name: whether the mean meets it, and whether the pessimistic end of its interval
    does.
    """
    means, bounds = reached(judged), reached(judged, "bound")
    return {NAMES[key]: [means[key], bounds[key]] for key in means}


def verdict(judged: Rates) -> str:
    """One sentence on a method, from its table on the judging half."""
    met, sure = reached(judged), reached(judged, "bound")
    if not met["target", "success"]:
        return f"does not write the target ({_mean(judged, ('target', 'success')):.3g} of it)"
    missed = [f"{NAMES[key]} {_mean(judged, key):.3g}" for key in met if not met[key]]
    if missed:
        return "writes the target, but misses " + ", ".join(missed)
    open_ends = [NAMES[key] for key in sure if not sure[key]]
    if open_ends:
        return (
            f"meets every goal; the interval of {', '.join(open_ends)} also holds values "
            f"that do not"
        )
    return "meets every goal, with the whole of every 95 % interval"


def _mean(judged: Rates, key: tuple[str, str]) -> float:
    kind, measure = key
    return judged.get(kind, {}).get(measure, {}).get("mean", float("nan"))


def methods_table(found: Mapping[str, Any], half: str = "judge") -> Table:
    """All methods: means, below each the pessimistic end of its 95 % interval."""
    columns: list[Column | str] = [
        Column("method"),
        *(Column(name, align="right") for name, _, _ in COLUMNS),
    ]
    columns += [Column("seconds", ".0f"), Column("seeds")]
    rows: list[list[Any]] = [["unedited", *_cells(found["unedited"], ends=False), None, None]]
    rows += [
        [entry["method"], *_cells(entry[half]), entry["seconds"], entry["seeds"]]
        for entry in found["methods"]
        if half in entry
    ]
    return Table(columns, rows)


def _cells(judged: Rates, ends: bool = True) -> list[str]:
    cells = []
    for _, kind, measure in COLUMNS:
        estimate = judged.get(kind, {}).get(measure)
        if estimate is None:
            cells.append("")
            continue
        end, sign = (estimate["high"], "≤") if measure == "kl" else (estimate["low"], "≥")
        cells.append(f"{estimate['mean']:.3f}" + (f"\n{sign} {end:.3f}" if ends else ""))
    return cells


def interference_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table a method: what is written down, whether each target and its paraphrases hold across,
    and what else moved.
    """
    about = found["head"]["targets"]
    others = {
        "locality": ("unrelated", "identical"),
        "sums same": ("sums", "identical"),
        "clear": ("sums", "clear"),
        "KL sums": ("sums", "kl"),
    }
    columns: list[Column | str] = ["written", *(Column(name, align="right") for name in about)]
    columns += [Column(name, ".3f", "right") for name in others]
    made = []
    for name, records in found["interference"].items():
        rows, notes = [], []
        for record in records:
            if record["reason"]:
                notes.append(f"{record['written']}: {record['reason'][:100]}")
                continue
            said = [
                f"{cell['target']['success']['mean']:.0f} / "
                f"{cell['paraphrase']['success']['mean']:.2f}"
                for cell in (record["about"][target] for target in about)
            ]
            means = [_mean(record["judge"], key) for key in others.values()]
            rows.append([record["written"], *said, *means])
        made.append(Table(columns, rows, f"{name}: target / paraphrases of each sum", notes))
    return made


def bounds(found: Mapping[str, Any]) -> str:
    """What stands between the methods and the goals: the best of those that write the target."""
    entries = [e for e in found["methods"] if "goals" in e and e["goals"]["target"][0]]
    winners = [e["method"] for e in entries if all(mean for mean, _ in e["goals"].values())]
    if winners:
        return f"All goals at once: {', '.join(winners)}."
    if not entries:
        return "No method writes the target."
    nearest = max(entries, key=lambda e: sum(mean for mean, _ in e["goals"].values()))
    best = []
    for key, goal in GOAL[1:]:
        kind, measure = key
        choose = min if measure == "kl" else max
        means = {
            e["method"]: _mean(e["judge"], key)
            for e in entries
            if measure in e["judge"].get(kind, {})
        }
        if means:
            name = choose(means, key=means.__getitem__)
            best.append(f"{NAMES[key]} {means[name]:.2f} ({name}, goal {goal:g})")
    return (
        f"No method meets all goals at once. Nearest: {nearest['method']}, which "
        f"{nearest['verdict']}. "
        f"Best of each goal among methods that write the target: {'; '.join(best)}."
    )


def summary(found: Mapping[str, Any]) -> str:
    """The written summary, Markdown that also reads well as plain text."""
    head = found["head"]
    targets, counts = ", ".join(f"“{t}”" for t in head["targets"]), head["prompts"]
    parts = [
        f"# {targets}, and nothing else? {head['model']}",
        f"{counts['paraphrase']} paraphrases ({head['paraphrases']}), {counts['sums']} other "
        f"sums, {counts['unrelated']} unrelated prompts ({head['unrelated']}); greedy, "
        f"{head['tokens'][0]} new tokens (longer: {head['tokens'][1]}); seeds "
        f"{', '.join(map(str, head['seeds']))}. Judged on the halves no method saw; 95 % "
        f"bootstrap intervals over prompts.",
        "\n".join(f"* {note}" for note in found["notes"]),
        "## Judging half",
        _block(methods_table(found)),
        "## Verdicts",
        "\n".join(f"* **{method}** {said}" for method, said in verdicts(found)),
        bounds(found),
    ]
    if found["interference"]:
        parts += ["## Several sums at once", *map(_block, interference_tables(found))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(table: Table) -> str:
    return f"```\n{table.text()}\n```"


def verdicts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each method and what is said of it."""
    made = []
    for entry in found["methods"]:
        said = f"{entry['verdict']}." if "verdict" in entry else ""
        if entry["reason"]:
            said = (
                f"{said} Not for every seed: {entry['reason']}"
                if said
                else f"not run: {entry['reason']}"
            )
        made.append((entry["method"], said))
    return made
