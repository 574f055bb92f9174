"""A calibration as tables: what was measured, layer by layer, and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from knowedit.io.tables import Column, Table
from knowedit.models.calibration import Calibration


def measured(found: Calibration) -> Table:
    """A row a layer; at the chosen one also with all contexts."""
    chosen, sinks = found.choice, found.sinks
    columns = [
        Column("layer"),
        Column("contexts"),
        Column("score", ".3f"),
        Column("exact", ".0%"),
        Column("paraphrase", ".0%"),
        Column("gain", ".2f"),
        Column("KL neighbours", ".4f"),
        Column("KL ordinary", ".5f"),
        Column("norm", ".2f"),
        Column("traced", "+.3f"),
        Column("neurons", ".3f"),
        Column("writes at most", ".1f"),
    ]
    rows = [
        (
            trial.layer,
            trial.contexts,
            trial.mean,
            trial.exact,
            trial.paraphrase,
            trial.gain,
            trial.neighbours,
            trial.ordinary,
            trial.norm,
            trial.traced,
            sum(trial.apart) / len(trial.apart),
            sinks.written[trial.layer],
        )
        for trial in [*found.layers, *(t for t in found.contexts if t.contexts > 1)]
    ]
    carried = ", ".join(f"{at} ({sinks.written[at]:.0f})" for at in sinks.layers) or "none"
    notes = [
        f"{found.model}: {found.facts} facts, {found.seconds:.0f} s of one processor. Attention "
        f"sinks at layers (times the median): {carried}.",
        f"Chosen: layer {chosen.layer}; to share a change {list(chosen.shared_layers)}; for "
        f"neurons {chosen.neuron_layer}; clamp {chosen.clamp:g}, steps {chosen.steps}, "
        f"{len(chosen.contexts)} contexts.",
    ]
    return Table(columns, rows, notes=notes).without_empty_columns()


def choices(found: Sequence[Calibration]) -> Table:
    """A row a model."""
    columns = [
        Column("model"),
        Column("sinks"),
        Column("layer"),
        Column("shared"),
        Column("neurons"),
        Column("clamp", "g"),
        Column("steps"),
        Column("contexts"),
        Column("CPU s", ".0f"),
    ]
    rows = [
        (
            one.model,
            ", ".join(map(str, one.sinks.layers)) or "none",
            one.choice.layer,
            ", ".join(map(str, one.choice.shared_layers)),
            one.choice.neuron_layer,
            one.choice.clamp,
            one.choice.steps,
            len(one.choice.contexts),
            one.seconds,
        )
        for one in found
    ]
    return Table(columns, rows)
