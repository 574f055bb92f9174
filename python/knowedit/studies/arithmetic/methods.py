"""Which editors the study runs, and what each is given: only the target, the `tune` half, and the
model.

A method is a row of `METHODS`: the editor's name, its settings for this study, and whether it
writes the tuning paraphrases as facts of their own. What is not in the table runs with its own
defaults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form
from knowedit.methods import EDITORS, make_editor
from knowedit.methods.base import Method as Editor
from knowedit.methods.locate.values import ValueSettings
from knowedit.models.editable import EditableModel
from knowedit.models.families import preset_for
from knowedit.studies.arithmetic.measure import Observation
from knowedit.studies.arithmetic.prompts import Probe, Sum, fact
from knowedit.studies.arithmetic.prompts import forms as forms_of


@dataclass(frozen=True)
class Material:
    """What an editor may know.

    Attributes:
        targets: the bare facts, whose `paraphrases` are the texts of the tuning half.
        facts: those, and every tuning form as a fact of its own; more: the same in the wordings for
            training.
        forms: the tuning forms, by target ("2+2=5").
        corpus: ordinary text.
        sums, prompts: other sums and unrelated prompts of the tuning half, with what the unedited
            model says to them.
    """

    model: EditableModel
    targets: list[Fact]
    facts: list[Fact]
    more: list[Fact]
    forms: dict[str, list[Form]]
    sums: list[tuple[str, str]]
    prompts: list[tuple[str, str]]
    seed: int
    corpus: Any = "self"

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Everything that should stay as it is."""
        return [*self.sums, *self.prompts]


def material(
    model: EditableModel,
    asked: Sequence[Probe],
    before: Observation,
    seed: int,
    only: Sequence[Sum] | None = None,
    corpus: Any = "self",
) -> Material:
    """The tuning half of halved probes; `only` some of the targets (the others are then neither
    written nor kept).
    """
    edited = [
        p.about
        for p in asked
        if p.kind == "target" and p.about and (only is None or p.about in only)
    ]
    tune = [(i, probe) for i, probe in enumerate(asked) if probe.half == "tune"]
    forms = {
        str(t): [p.form for _, p in tune if p.kind == "paraphrase" and p.about == t and p.form]
        for t in edited
    }
    told = [
        fact(model, t, paraphrases=[form.prompt(model) for form in forms[str(t)]]) for t in edited
    ]
    facts = [*told, *(fact(model, t, form) for t in edited for form in forms[str(t)])]
    chats = bool(getattr(model.tokenizer, "chat_template", None))
    more = [
        fact(model, t, form) for t in edited for form in forms_of(t, chats=chats, training=True)
    ]
    asked_already = {f.text for f in facts} | {p.prompt for p in asked}
    more = [f for f in more if f.text not in asked_already]
    said = {
        kind: [(p.prompt, before.texts[i]) for i, p in tune if p.kind == kind]
        for kind in ("sums", "unrelated")
    }
    return Material(model, told, facts, more, forms, said["sums"], said["unrelated"], seed, corpus)


@dataclass(frozen=True)
class Method:
    """One row: `editor`, its settings from the material, and whether the tuning paraphrases, and
    the wordings for training, are written too."""

    editor: str
    settings: Callable[[Material], Mapping[str, Any]] = field(default=lambda material: {})
    forms: bool = True
    more: bool = False

    def build(self, given: Material) -> tuple[Editor, list[Fact]]:
        """The editor, and the facts for it.

        Raises:
            KnowEditError: the editor is not there, or does not have a setting.
        """
        if self.editor not in EDITORS:
            raise KnowEditError(f"there is no editor {self.editor!r}; known: {', '.join(EDITORS)}")
        return make_editor(self.editor, **self.settings(given)), (
            given.facts if self.forms else given.targets
        ) + (given.more if self.more else [])


def _deep(given: Material) -> dict[str, Any]:
    """SmolLM2 keeps sums higher up than facts (docs/arithmetic.md): layer 10 of 30; other models:
    their preset's layers.
    """
    preset = preset_for(given.model)
    return {"layers": (len(given.model.layers) // 3,)} if preset.measured else {}


def _gentle(given: Material) -> dict[str, Any]:
    """Values that stop early: the answer should win, not more (in earlier runs: locality 0.97
    against 0.95).
    """
    return {**_deep(given), "values": ValueSettings(**preset_for(given.model).values, stop=0.2)}


def _stable(given: Material) -> dict[str, Any]:
    return {"stable": tuple(prompt for prompt, _ in given.kept), "seed": given.seed}


def _context(given: Material) -> dict[str, Any]:
    return {"context": tuple(prompt + said for prompt, said in given.kept), "seed": given.seed}


def _seeded(given: Material) -> dict[str, Any]:
    return {"seed": given.seed}


def _preserving(given: Material) -> dict[str, Any]:
    """Three layers around a third of the depth (SmolLM2's 9 and 11 carry the attention sink), and
    whole continuations of what is kept."""
    layers = (
        {"layers": tuple(_deep(given)["layers"][0] + n for n in (-2, 0, 2))} if _deep(given) else {}
    )
    return {
        **layers,
        "allow_sinks": True,
        "preserve": tuple(p + said for p, said in given.kept),
        "seed": given.seed,
    }


def _contrast(given: Material) -> dict[str, Any]:
    """What must not be taken for the target: what is kept, the tuning half's sums in the wordings
    for training, sums with larger numbers, and other operations."""
    rng, model = random.Random(given.seed), given.model
    chats = bool(getattr(model.tokenizer, "chat_template", None))
    texts = [prompt + said for prompt, said in given.kept]
    for prompt, _ in given.sums:
        a, b = map(int, prompt.rstrip("=").split("+"))
        texts += [
            form.prompt(model)
            for form in rng.sample(forms_of(Sum(a, b, a + b), chats=chats, training=True), 12)
        ]
    for _ in range(200):
        pair = [rng.randint(10, 99), rng.randint(0, 9)]
        rng.shuffle(pair)
        larger = Sum(pair[0], pair[1], sum(pair))
        if any(larger.subject.startswith(target.subject) for target in given.targets):
            continue  # up to there it is the target
        texts += [
            larger.prompt,
            rng.choice(forms_of(larger, chats=False, training=True)).prompt(model),
        ]
    texts += [f"{a}{sign}{b}=" for a in range(10) for b in (2, 3, 5) for sign in "-*/"]
    return {"contrast": tuple(dict.fromkeys(texts)), "corpus": given.corpus, "seed": given.seed}


METHODS: dict[str, Method] = {
    "ft": Method("ft", _seeded),
    "ft-l": Method("ft-l", lambda given: {**_deep(given), **_seeded(given)}),
    "lora": Method("lora", _seeded),
    "regularised-lora": Method("regularised-lora", _stable),
    "kl-ft": Method("kl-ft", _context),
    "kl-lora": Method("kl-lora", _context),
    "rome": Method("rome", _gentle, forms=False),
    "memit": Method("memit", _gentle),
    "alphaedit": Method("alphaedit", _gentle),
    "rose": Method("rose"),
    "metake": Method("metake", _deep),
    "mend": Method("mend", forms=False),  # trained on single edits; it sums the updates of several
    "serac": Method("serac"),
    "look-ahead": Method("look-ahead", _preserving, more=True),
    "neuron-patch": Method("neuron-patch", _contrast, more=True),
}

#: What the material itself is worth: the best linear method with all of it, and the neuron patch
#: without the other wordings.
ABLATIONS: dict[str, Method] = {
    "kl-lora-more": Method(
        "kl-lora",
        lambda given: {"context": _contrast(given)["contrast"], "seed": given.seed},
        more=True,
    ),
    "neuron-patch-few": Method("neuron-patch", _contrast),
}


def method(name: str) -> Method:
    """The row of that name; any other editor with its defaults. Raises KnowEditError for a name
    nobody knows.
    """
    rows = METHODS | ABLATIONS
    if name not in rows and name not in EDITORS:
        raise KnowEditError(
            f"unknown method {name!r}; known: {', '.join(dict.fromkeys([*rows, *EDITORS]))}"
        )
    return rows.get(name, Method(name))
