"""What `--json` prints, command by command: the table of the reference, which the tests hold to
what is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Printed:
    """The keys of an object.

    Attributes:
        keys: separated by commas; one in [brackets] is not always there, "..." stands for more.
        form: around the objects: "" (one alone), "list", or "file: list" (a list by each name).
        when: where a command prints several kinds, which this is.
    """

    keys: str
    form: str = ""
    when: str = ""

    def fits(self, record: Any) -> bool:
        """Whether `record`, read from what was printed, is as this says."""
        keys = self.keys.split(", ")
        known = {key.strip("[]") for key in keys}
        needed = {key for key in keys if key[0] != "[" and key != "..."}
        objects = self._objects(record)
        if objects is None:
            return False
        return all(
            isinstance(one, Mapping)
            and needed <= set(one)
            and ("..." in known or set(one) <= known)
            for one in objects
        )

    def _objects(self, record: Any) -> list[Any] | None:
        """The objects in `record`; None where it is of another form."""
        if self.form == "file: list":
            lists: list[Any] = list(record.values()) if isinstance(record, Mapping) else [None]
            whole = all(isinstance(found, list) for found in lists)
            return [one for found in lists for one in found] if whole else None
        if self.form == "list":
            return record if isinstance(record, list) else None
        return [record]


JSON: dict[str, tuple[Printed, ...]] = {
    "demo": (Printed("model, fingerprints, prompts, evaluation, drift, report, said"),),
    "edit": (Printed("file, key, fingerprint, facts, config, report, said"),),
    "apply": (Printed("folder, fingerprint, edits, [tensors]"),),
    "undo": (Printed("folder, fingerprint, original"),),
    "diff": (Printed("first, second, parameters, weights, notes, facts"),),
    "export": (Printed("format, folder, fingerprint, edits, notes, [served]"),),
    "inspect": (
        Printed(
            "kind, key, fingerprint, facts, weights, config, software, report, notes",
            when="of an edit",
        ),
        Printed("kind, edits", when="of a history"),
        Printed("kind, model, fingerprint, edits, restores", when="of an edited model"),
        Printed("kind, format, ...", when="of statistics, as stats show"),
        Printed("kind, facts", when="of facts"),
        Printed("kind, ...", when="of anything else"),
    ),
    "eval": (
        Printed(
            "model, dataset, method, protocol, facts, seconds, side_effects, evaluation, report, "
            "config, trajectory, run, said, [generation]",
            "list",
        ),
        Printed("format, sweep, rows", when="of a grid"),
    ),
    "recommend": (Printed("model, facts, choice, sentence, skipped, rows"),),
    "try": (Printed("asked, before, after, facts", "list"),),
    "same-subject": (
        Printed("model, dataset, method, seconds, report, config, drift, evaluation", "list"),
    ),
    "geometry": (
        Printed(
            "layer, facts, subjects, edited, kappa, null, forms, values, recall, points, within",
            "list",
        ),
    ),
    "calibrate": (
        Printed(
            "kind, version, model, fingerprint, shape, facts, sinks, layers, contexts, values, "
            "choice, seconds"
        ),
    ),
    "trace": (
        Printed(
            "model, prompt, tokens, subject, answer, token, clean, corrupted, rows, effect, low, "
            "high, window, deviation, samples, seed, warnings"
        ),
        Printed(
            "model, rows, counts, effect, low, high, facts, unknown, unusable, advice, window, "
            "deviation, samples, seed",
            when="with --dataset",
        ),
    ),
    "report": (Printed("page, sections, [tables]"),),
    "stats collect": (
        Printed(
            "layer, module, tokens, trace, first_token_ratio, sink, audit, padding, batches, "
            "ranks, convergence, version, [commits]",
            "list",
        ),
    ),
    "stats ls": (Printed("folder, model, fingerprint, layers, tokens, corpus, bytes", "list"),),
    "stats show": (
        Printed(
            "format, layer, module, model, recipe, count, first_norm, other_norm, extra", "list"
        ),
    ),
    "stats verify": (Printed("name, ok, detail", "file: list"),),
    "stats export": (Printed("from, file, layer", "list"),),
    "stats import": (Printed("from, file, layer, tokens", "list"),),
    "stats clean": (Printed("folder, deleted"),),
    "train mend": (
        Printed(
            "file, settings, facts, trainable_parameters, steps, seconds, cpu_seconds, "
            "preparation_seconds, peak_memory_bytes, start_rate, validation, curve"
        ),
    ),
    "train serac": (
        Printed(
            "file, settings, facts, trainable_parameters, gate_parameters, reader_parameters, "
            "seconds, cpu_seconds, preparation_seconds, peak_memory_bytes, validation, "
            "gate_curve, reader_curve"
        ),
    ),
    "session open": (Printed("folder, model, fingerprint, method"),),
    **dict.fromkeys(
        ("session apply", "session correct", "session forget"),
        (Printed("folder, key, written, facts, taken_out, written_again, standing, report, said"),),
    ),
    "session list": (Printed("folder, model, fingerprint, method, edits, facts"),),
    "session compact": (Printed("folder, edits, standing"),),
    "session rollback": (Printed("folder, until, undone, standing"),),
    "study arithmetic": (Printed("head, notes, unedited, runs, interference, methods"),),
    "methods": (
        Printed("name, group, what", "list"),
        Printed("kind, version, ...", when="of one method"),
    ),
    "datasets": (Printed("name, here, bytes, files, what", "list"),),
    "models": (
        Printed("copies, presets"),
        Printed("model, folder", when="with --get"),
    ),
    "doctor": (Printed("machine, versions, kernels, [left by killed runs], [model], [checks]"),),
}


def table() -> str:
    """As Markdown."""
    forms = {"": "", "list": "a list of: ", "file: list": "by file, a list of: "}
    rows = [
        f"| `knowedit {name}`{' ' * bool(one.when)}{one.when} | {forms[one.form]}{one.keys} |"
        for name, kinds in JSON.items()
        for one in kinds
    ]
    head = "`--json` prints one value; a key in [brackets] is not always there.\n"
    return "\n".join([head, "| `--json` of | the object's keys |", "|---|---|", *rows, ""])
