"""Second moments of keys at other entities: what an edit of one subject should leave alone besides ordinary text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .datasets.relations import INSTRUCTIONS, relations
from .model import EditableModel

_CLOZE = "Some facts about {}"


def entity_moments(model: EditableModel, layers: Sequence[int], leave_out: Sequence[str] = ()) -> dict[int, Tensor]:
    """`{layer: E[k kᵀ] [d_ff, d_ff]}` float64 of the keys at the last token of the shipped entities, each once in a plain
    sentence of its relation and once in an instruction (where the model has a chat template).

    Args:
        leave_out: subjects that are not to be protected: those being edited.
    """
    left, rows = {name.casefold() for name in leave_out}, []
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    for pools in relations().values():
        wordings = pools["paraphrases"]["train"] or [_CLOZE]
        for number, name in enumerate(pools["entities"]):
            if name.casefold() in left:
                continue
            text = wordings[number % len(wordings)].replace("{}", name)
            rows.append(model.row(text, name))
            if chat:
                rows.append(model.row(model.chat(INSTRUCTIONS["train"][0].replace("{}", text)), name))
    found = model.keys([row for row in rows if row.subject], layers)[0]
    return {layer: keys.double().T @ keys.double() / len(keys) for layer, keys in found.items()}
