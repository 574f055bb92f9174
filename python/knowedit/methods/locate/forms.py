"""The forms in which a fact is asked for while an edit is made."""

from __future__ import annotations

from dataclasses import replace

from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form, training_forms
from knowedit.methods.locate.task import Questions
from knowedit.models.editable import EditableModel


def asked_forms(model: EditableModel, fact: Fact, questions: Questions) -> list[Form]:
    """A fact's training forms with the wordings asked for, the bare prompt first; no chats for a
    model without a chat template.
    """
    if questions == "generic":
        found = training_forms(replace(fact, relation=None))
    else:
        given, names = questions or {}, (fact.id, fact.prompt, fact.relation)
        wordings = next((given[name] for name in names if name and name in given), ())
        found = training_forms(fact, wordings)
    return [form for form in found if model.tokenizer.chat_template or not form.chat]
