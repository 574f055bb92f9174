"""Second moments of keys at other entities: what an edit of one subject should leave alone besides
ordinary text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import occurs
from knowedit.facts.wordings.relations import INSTRUCTIONS, relations
from knowedit.models.editable import EditableModel
from knowedit.statistics.experts import moment_of

_CLOZE = "Some facts about {}"


def entity_moments(
    model: EditableModel,
    layers: Sequence[int],
    leave_out: str = "",
    pool: Sequence[Fact] = (),
    *,
    most: int = 900,
    seed: int = 0,
) -> dict[int, Tensor]:
    """`{layer: E[k kᵀ] [d_ff, d_ff]}` float64 (of routed experts `[E, d, d]`) of the keys at
    entities' last tokens, in a plain
    sentence and (where the model has a chat template) in an instruction.

    Args:
        leave_out: entities that occur in this text are not protected: those being edited, and those
            an edit is trained or tested on (protecting these in the metric would blind the
            training, and flatter the test).
        pool: facts whose subjects are taken besides the shipped entities.
        most: entities; more are sampled by `seed`.
    """
    found = {fact.subject: fact.text for fact in pool}
    for pools in relations().values():
        wordings = pools["paraphrases"]["train"] or [_CLOZE]
        for number, name in enumerate(pools["entities"]):
            found.setdefault(name, wordings[number % len(wordings)].replace("{}", name))
    left = leave_out.casefold()
    names = sorted(name for name in found if not occurs(name.casefold(), left))
    rows, chat = [], bool(model.tokenizer.chat_template)
    for name in random.Random(seed).sample(names, min(most, len(names))):
        texts = (
            [found[name], model.chat(INSTRUCTIONS["train"][0].replace("{}", found[name]))]
            if chat
            else [found[name]]
        )
        with suppress(EditError):  # a name that ends inside a token is not protected
            rows += [model.row(text, name) for text in texts]
    keys = model.keys([row for row in rows if row.subject], layers)[0]
    experts = model.layout.experts
    return {layer: moment_of(k.double(), experts(layer)) for layer, k in keys.items()}
