"""Which methods the study runs, and what each is given: only the target, the `tune` half, and the
model.

The experiments are data, `experiments.yaml` beside this file: a method's name, its settings for
this study, what of the study it is given, and which facts it writes. What is not there runs with
its own defaults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form
from knowedit.io.names import nearest, spelled
from knowedit.methods.base import Method
from knowedit.methods.listing import methods
from knowedit.methods.registry import make_method
from knowedit.models.editable import EditableModel
from knowedit.models.presets import preset_for
from knowedit.studies.arithmetic.measure import Responses
from knowedit.studies.arithmetic.prompts import StudyPrompt, Sum, fact
from knowedit.studies.arithmetic.prompts import forms as forms_of


@dataclass(frozen=True)
class TuningMaterial:
    """What a method may know.

    Attributes:
        targets: the bare facts, whose `paraphrases` are the texts of the tuning half.
        facts: those, and every tuning form as a fact of its own; more: the same in the wordings for
            training.
        forms: the tuning forms, by target ("2+2=5").
        corpus: ordinary text.
        sums, prompts: other sums and unrelated prompts of the tuning half, with what the unedited
            model says to them.
        lead: what every sum "a+b=" stands behind.
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
    lead: str = ""

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Everything that should stay as it is."""
        return [*self.sums, *self.prompts]


def material(
    model: EditableModel,
    asked: Sequence[StudyPrompt],
    before: Responses,
    seed: int,
    only: Sequence[Sum] | None = None,
    corpus: Any = "self",
    lead: str = "",
) -> TuningMaterial:
    """The tuning half of halved prompts; `only` some of the targets (the others are then neither
    written nor kept).
    """
    edited = [
        p.about
        for p in asked
        if p.kind == "target" and p.about and (only is None or p.about in only)
    ]
    tune = [(i, prompt) for i, prompt in enumerate(asked) if prompt.half == "tune"]
    forms = {
        str(t): [p.form for _, p in tune if p.kind == "paraphrase" and p.about == t and p.form]
        for t in edited
    }
    bare = [
        fact(model, t, paraphrases=[form.prompt(model) for form in forms[str(t)]], lead=lead)
        for t in edited
    ]
    facts = [*bare, *(fact(model, t, form) for t in edited for form in forms[str(t)])]
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
    return TuningMaterial(
        model, bare, facts, more, forms, said["sums"], said["unrelated"], seed, corpus, lead
    )


def contrast(given: TuningMaterial) -> tuple[str, ...]:
    """What must not be taken for the target: what is kept, the tuning half's sums in the wordings
    for training, sums with larger numbers, and other operations."""
    rng, model = random.Random(given.seed), given.model
    chats = bool(getattr(model.tokenizer, "chat_template", None))
    texts = [prompt + said for prompt, said in given.kept]
    for prompt, _ in given.sums:
        a, b = map(int, prompt.removeprefix(given.lead).rstrip("=").split("+"))
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
            f"{given.lead}{larger.prompt}",
            rng.choice(forms_of(larger, chats=False, training=True)).prompt(model),
        ]
    texts += [f"{given.lead}{a}{sign}{b}=" for a in range(10) for b in (2, 3, 5) for sign in "-*/"]
    return tuple(dict.fromkeys(texts))


#: What `given` may name, as the study's material has it.
GIVEN: dict[str, Callable[[TuningMaterial], Any]] = {
    "seed": lambda material: material.seed,
    "corpus": lambda material: material.corpus,
    "prompts": lambda material: tuple(prompt for prompt, _ in material.kept),
    "continuations": lambda material: tuple(prompt + said for prompt, said in material.kept),
    "contrast": contrast,
}
#: What `facts` may name.
FACTS: dict[str, Callable[[TuningMaterial], list[Fact]]] = {
    "targets": lambda material: material.targets,
    "forms": lambda material: material.facts,
    "forms and training": lambda material: material.facts + material.more,
}
#: What `layers` may name. SmolLM2 keeps sums higher up than facts (docs/arithmetic.md): at layer 10
#: of 30.
LAYERS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "third": lambda depth: (depth // 3,),
    "around third": lambda depth: tuple(depth // 3 + n for n in (-2, 0, 2)),
}


@dataclass(frozen=True)
class Experiment:
    """One entry of `experiments.yaml`, which says what the fields are.

    Raises:
        KnowEditError: `facts`, `layers` or `given` names what is not there.
    """

    method: str
    facts: str = "forms"
    layers: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)
    ablation: bool = False

    def __post_init__(self) -> None:
        checks: list[tuple[str, str | None, Mapping[str, Any]]] = [
            ("facts", self.facts, FACTS),
            ("layers", self.layers, LAYERS),
        ]
        checks += [("given", name, GIVEN) for name in self.given.values()]
        for where, name, known in checks:
            if name is not None and name not in known:
                raise KnowEditError(
                    f"experiment {self.method}: {where} is {name!r}; known: {', '.join(known)}"
                )

    def settings(self, material: TuningMaterial) -> dict[str, Any]:
        """The method's settings under `material`, as `Config.with_settings` takes them."""
        found = {name: GIVEN[what](material) for name, what in self.given.items()}
        if self.layers and preset_for(material.model).measured:
            found["layers"] = LAYERS[self.layers](len(material.model.layers))
        return found | dict(self.set)

    def build(self, material: TuningMaterial) -> tuple[Method, list[Fact]]:
        """The method, and the facts for it.

        Raises:
            KnowEditError: the method is not there, or does not have a setting.
        """
        return make_method(self.method, self.settings(material)), FACTS[self.facts](material)


@cache
def experiments() -> dict[str, Experiment]:
    """Every experiment by name, in the order they run."""
    import yaml

    path = Path(__file__).with_name("experiments.yaml")
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Experiment)}
    for name, entry in found.items():
        if unknown := sorted(set(entry) - known):
            raise KnowEditError(f"{path.name}: {name} has no {unknown[0]}; known: {sorted(known)}")
    return {name: Experiment(**{"method": name, **entry}) for name, entry in found.items()}


def check_settings(names: Iterable[str], settings: Iterable[str]) -> None:
    """Raise KnowEditError unless the method of every named experiment has these settings."""
    given = list(settings)
    for name in names if given else ():
        make_method(experiment(name).method, given)


def default_experiments() -> list[str]:
    """The names of those that run when none are named."""
    return [name for name, entry in experiments().items() if not entry.ablation]


def experiment(name: str) -> Experiment:
    """The entry of that name; any other method with its defaults. Raises KnowEditError for a name
    nobody knows.
    """
    known = experiments()
    names = dict.fromkeys([*known, *methods()])
    name = spelled(name, names)
    if name not in names:
        raise KnowEditError(f"unknown method {name!r}; {nearest(name, names)}")
    return known.get(name, Experiment(name))
