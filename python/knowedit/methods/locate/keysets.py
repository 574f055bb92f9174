"""Keysets: the tokens whose keys a value is written at."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from knowedit.io.config import Config
from knowedit.methods.locate.forms import asked_forms
from knowedit.methods.locate.keys import GroupKeys, group_keys, keys_at
from knowedit.methods.locate.task import Task


class Keys(Config):
    """Which keys a group of facts is written at."""

    family = "keys"

    @abstractmethod
    def at(self, task: Task, layer: int, *, of_mlp: bool) -> GroupKeys:
        """The keys of the task's groups at `layer`, and what they are written to: the outputs of
        the last edited layer, or (`of_mlp`) of its MLP.
        """


@dataclass(frozen=True)
class ContextKeys(Keys):
    """The subject's last token in every context of the target (ROME, MEMIT).

    Attributes:
        mean: one mean key a group, as published; else every fact's and context's own key, all with
            the same value: the bare prompt then gets the value too where its key differs from the
            mean (short prompts that start with the subject).
    """

    mean: bool = False

    def at(self, task: Task, layer: int, *, of_mlp: bool) -> GroupKeys:
        contexts, last = task.values.contexts, task.layers[-1]
        return group_keys(
            task.model, task.groups, layer, last, contexts, mean=self.mean, of_mlp=of_mlp
        )


@dataclass(frozen=True)
class FormKeys(Keys):
    """The subject's last token in the forms in which a fact is asked for (RoSE).

    Attributes:
        forms: by name (`facts.wordings.forms`); "bare" is the prompt itself.
        mean: one mean key a group; else every form's own.
    """

    forms: tuple[str, ...] = ("bare", "pre1", "ch1", "gc")
    mean: bool = True

    def at(self, task: Task, layer: int, *, of_mlp: bool) -> GroupKeys:
        rows = [
            [
                [
                    form.row(task.model)
                    for form in asked_forms(task.model, fact, task.material.questions)
                    if form.name in self.forms
                ]
                for fact in group
            ]
            for group in task.groups
        ]
        return keys_at(task.model, rows, layer, task.layers[-1], mean=self.mean, of_mlp=of_mlp)
