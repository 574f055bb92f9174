"""The study in words: which goals a method meets, its verdict, the table of all methods, and the
written summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knowedit.studies.arithmetic.measure import GOAL, Table, reached

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


def goals(judged: Table) -> dict[str, list[bool]]:
    """Each goal by name: whether the mean meets it, and whether the pessimistic end of its interval
    does.
    """
    means, bounds = reached(judged), reached(judged, "bound")
    return {NAMES[key]: [means[key], bounds[key]] for key in means}


def verdict(judged: Table) -> str:
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


def _mean(judged: Table, key: tuple[str, str]) -> float:
    kind, measure = key
    return judged.get(kind, {}).get(measure, {}).get("mean", float("nan"))


def lines(found: Mapping[str, Any], half: str = "judge") -> list[str]:
    """The table of all methods as text: means, below them the pessimistic ends of the 95 %
    intervals.
    """
    width = max([10, *(len(entry["method"]) for entry in found["methods"])])
    made = [
        f"{'':{width}}"
        + "".join(f"{name:>11}" for name, _, _ in COLUMNS)
        + f"{'seconds':>9}{'seeds':>7}"
    ]
    rows = [("unedited", found["unedited"], None, 0)]
    rows += [
        (entry["method"], entry[half], entry["seconds"], entry["seeds"])
        for entry in found["methods"]
        if half in entry
    ]
    for name, judged, seconds, seeds in rows:
        estimates = [judged.get(kind, {}).get(measure) for _, kind, measure in COLUMNS]
        means = "".join(f"{'' if e is None else format(e['mean'], '.3f'):>11}" for e in estimates)
        made.append(
            f"{name:{width}}" + means + ("" if seconds is None else f"{seconds:>9.0f}{seeds:>7}")
        )
        if seconds is not None:
            ends = [
                e and e["high" if m == "kl" else "low"] for e, (_, _, m) in zip(estimates, COLUMNS)
            ]
            signs = ["≤" if m == "kl" else "≥" for _, _, m in COLUMNS]
            made.append(
                " " * width
                + "".join(f"{'' if v is None else f'{s} {v:.3f}':>11}" for v, s in zip(ends, signs))
            )
    return made


def interference_lines(found: Mapping[str, Any]) -> list[str]:
    """For each method: what is written down, whether each target and its paraphrases hold across,
    and what else moved.
    """
    made: list[str] = []
    for name, records in found["interference"].items():
        about = found["head"]["targets"]
        head = (
            "".join(f"{t:>16}" for t in about)
            + f"{'locality':>10}{'sums same':>10}{'clear':>8}{'KL sums':>9}"
        )
        width = max(28, *(len(record["written"]) for record in records)) + 2
        made += ["", f"{name}: target / paraphrases of each sum", f"{'written':{width}}" + head]
        for record in records:
            if record["reason"]:
                made.append(f"{record['written']:{width}}  {record['reason'][:100]}")
                continue
            cells = [record["about"][t] for t in about]
            said = [
                f"{c['target']['success']['mean']:.0f} / {c['paraphrase']['success']['mean']:.2f}"
                for c in cells
            ]
            other = [
                _mean(record["judge"], key)
                for key in (("unrelated", "identical"), ("sums", "identical"))
            ]
            other += [_mean(record["judge"], ("sums", m)) for m in ("clear", "kl")]
            made.append(
                f"{record['written']:{width}}"
                + "".join(f"{s:>16}" for s in said)
                + f"{other[0]:>10.3f}{other[1]:>10.3f}{other[2]:>8.3f}{other[3]:>9.3f}"
            )
    return made[1:]


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
    """The written summary, Markdown."""
    head = found["head"]
    targets, counts = ", ".join(f"“{t}”" for t in head["targets"]), head["prompts"]
    parts = [
        f"# {targets}, and nothing else? {head['model']}",
        f"{counts['paraphrase']} paraphrases ({head['paraphrases']}), {counts['sums']} other "
        f"sums, {counts['unrelated']} "
        f"unrelated prompts ({head['unrelated']}); greedy, {head['tokens'][0]} new tokens "
        f"(longer: {head['tokens'][1]}); seeds "
        f"{', '.join(map(str, head['seeds']))}. Judged on the halves no editor saw; 95 % "
        f"bootstrap intervals over prompts.",
        "\n".join(f"* {note}" for note in found["notes"]),
        "## Judging half",
        "```\n" + "\n".join(lines(found)) + "\n```",
        "## Verdicts",
        "\n".join(f"* **{method}** {said}" for method, said in verdicts(found)),
        bounds(found),
    ]
    if found["interference"]:
        parts += [
            "## Several sums at once",
            "```\n" + "\n".join(interference_lines(found)) + "\n```",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
