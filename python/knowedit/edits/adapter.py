"""Edits as the low-rank pairs that an adapter holds, whichever program reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from knowedit.edits.changes import LowRank
from knowedit.errors import EditError
from knowedit.models.editable import EditableModel

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit


def low_rank(model: EditableModel, edits: Sequence[Edit]) -> dict[str, LowRank]:
    """The sum of the edits by parameter, their factors side by side; at most as many as the
    parameter is wide.

    Raises:
        EditError: there is none, one is of another model, or changes something densely.
    """
    found: dict[str, LowRank] = {}
    for edit in edits:
        edit.check(model)
        changes = edit.by_parameter(model)
        dense = sorted(name for name, change in changes.items() if not isinstance(change, LowRank))
        if dense:
            raise EditError(
                f"this {edit.method_name} edit changes {len(dense)} parameters densely "
                f"({dense[0]}, ...), which no LoRA adapter "
                "can hold; write it into a copy of the model instead (save_edited, `knowedit "
                "apply`)"
            )
        for name, change in changes.items():
            assert isinstance(change, LowRank)
            before = found.get(name)
            found[name] = (
                change
                if before is None
                else LowRank(torch.cat([before.U, change.U], 1), torch.cat([before.V, change.V], 1))
            )
    if not found:
        raise EditError("no edits to export; name at least one that changes weights")
    return {name: change.least() for name, change in found.items()}


def is_tied(model: EditableModel, name: str) -> bool:
    """Whether a parameter is both the embedding and the head."""
    ends = (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    return weights[0] is not None and weights[0] is weights[1] and model.stored(name) is weights[0]
