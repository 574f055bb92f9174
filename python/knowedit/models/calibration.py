"""`Calibration`: what was measured on one model, and the settings that follow from it; where it is
kept and found.

What `knowedit calibrate MODEL` finds is kept by the fingerprint of the weights in the cache; the
folder beside this file holds those that the package ships. `models.presets.preset_for` takes them
from here.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from knowedit.errors import EditError, KnowEditError
from knowedit.io.config import Config
from knowedit.io.files import atomic_file, cache_dir
from knowedit.models.editable import EditableModel
from knowedit.models.sinks import Sinks, measure_sinks

SHIPPED = Path(__file__).with_name("calibrations")
#: Sinks of models with fewer parameters are measured in milliseconds, and not kept on the disk.
SMALL = 20_000_000

Kept = TypeVar("Kept", bound=Config)


@dataclass(frozen=True)
class LayerTrial(Config):
    """Each fact alone, written by a rank-one change of one layer; means over the facts.

    Attributes:
        layer: its number.
        contexts: templates around each prompt, of those that methods use.
        traced: what restoring the MLPs around it at the subject's last token gives back of the true
            answer's probability (causal tracing); None where the layers cannot be replayed.
        exact: share of the facts that the changed model says at their own prompts.
        paraphrase: p(new) / (p(new) + p(true)) at the facts' paraphrases, p a token's geometric
            mean.
        gain: share of the planned change that is realised at the paraphrases' own keys.
        neighbours, ordinary: KL(before || changed) of the next token, in nats, after the facts'
            neighbour prompts and in ordinary text.
        norm: largest |delta| / |z0| of the values.
        score, apart: by fact, what layers are chosen by, for changes and for neurons
            (docs/calibration.md).
    """

    layer: int
    contexts: int
    traced: float | None
    exact: float
    paraphrase: float
    gain: float
    neighbours: float
    ordinary: float
    norm: float
    score: tuple[float, ...]
    apart: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The score's mean over the facts."""
        return sum(self.score) / len(self.score)


@dataclass(frozen=True)
class ValueTrial(Config):
    """The values of all facts at one layer, optimised with one clamp.

    Attributes:
        layer, clamp: where, and with which largest |delta| / |z0|.
        contexts: templates around each prompt.
        reached: share of the facts whose answer gets a p of 0.8 a token.
        steps: updates until then, the largest over the facts that reach it; 0 where none does.
    """

    layer: int
    clamp: float
    contexts: int
    reached: float
    steps: int


@dataclass(frozen=True)
class Choice(Config):
    """The settings that follow.

    Attributes:
        layer: for methods that edit one layer, and MEMIT's.
        shared_layers: for methods whose layers share the norm of a change (RoSE, Look-Ahead).
        neuron_layer: NeuronPatch's.
        steps, lr, clamp: of the value optimisation; lr None: about a tenth of the state's norm a
            step.
        contexts: the templates around each prompt.
    """

    layer: int
    shared_layers: tuple[int, ...]
    neuron_layer: int
    steps: int
    lr: float | None
    clamp: float
    contexts: tuple[str, ...]


@dataclass(frozen=True)
class Calibration(Config):
    """One model, measured.

    Attributes:
        model, fingerprint: its name, and the digest of its weights.
        shape: model type, layers, hidden size, key size.
        facts: how many, all of them known to the model.
        sinks: where attention sinks are written.
        layers, contexts, values: what was tried; the latter two at the chosen layer.
        choice: what follows from it.
        seconds: how long it took, of one processor.
    """

    model: str
    fingerprint: str
    shape: tuple[str, int, int, int]
    facts: int
    sinks: Sinks
    layers: tuple[LayerTrial, ...]
    contexts: tuple[LayerTrial, ...]
    values: tuple[ValueTrial, ...]
    choice: Choice
    seconds: float = 0.0

    def of(self, model: EditableModel) -> bool:
        """Whether it was measured on just these weights."""
        return self.fingerprint == _key(model)


def shape_of(model: EditableModel) -> tuple[str, int, int, int]:
    """Model type, layers, hidden size and key size."""
    return model.hf.config.model_type, len(model.layers), model.hidden, model.d_ff


def calibration_of(model: EditableModel) -> Calibration | None:
    """What was measured on these weights, by this user or as shipped; None where nothing was."""
    key = _key(model)
    return None if key is None else _read(Calibration, key) or shipped().get(key)


def calibration_of_shape(model: EditableModel) -> Calibration | None:
    """A shipped one of a model of the same shape: the same weights in another dtype, before they
    were quantised, or after a fine-tuning.
    """
    return next((c for c in shipped().values() if c.shape == shape_of(model)), None)


def keep(found: Calibration) -> Path:
    """Keep it in the cache; its file. Raises OSError."""
    _SINKS[found.fingerprint] = found.sinks
    return _write(found, found.fingerprint)


@cache
def shipped() -> dict[str, Calibration]:
    """Those of the package, by fingerprint."""
    files = sorted(SHIPPED.glob("*.json"))
    read = [Calibration.from_dict(json.loads(path.read_text("utf-8"))) for path in files]
    return {found.fingerprint: found for found in read}


#: Sinks of the models of this process, by fingerprint.
_SINKS: dict[str, Sinks] = {}


def sinks_of(model: EditableModel) -> Sinks:
    """THE sink test: which layers of `model` carry an attention sink. Known from its calibration,
    or measured once, in one pass over a few hundred tokens.
    """
    key = _key(model)
    if key is None:
        return measure_sinks(model)
    if key not in _SINKS:
        calibration = calibration_of(model)
        found = calibration.sinks if calibration else _read(Sinks, key)
        if found is None:
            found = measure_sinks(model)
            if sum(p.numel() for p in model.hf.parameters()) >= SMALL:
                with suppress(OSError):  # a disk that cannot be written costs the next run a pass
                    _write(found, key)
        _SINKS[key] = found
    return _SINKS[key]


def _key(model: EditableModel) -> str | None:
    """The fingerprint; None where it was never taken and an edit is in force."""
    try:
        return model.fingerprint
    except EditError:
        return None


def _file(cls: type[Config], key: str) -> Path:
    return cache_dir(cls.kind) / f"{key}.json"


def _read(cls: type[Kept], key: str) -> Kept | None:
    """What the cache keeps under `key`; None where there is none, not one of ours, or another
    model's.
    """
    try:
        record = json.loads(_file(cls, key).read_text("utf-8"))
        if not isinstance(record, dict) or record.get("fingerprint", record.pop("of", "")) != key:
            return None
        return cls.from_dict(record)
    except (OSError, ValueError, RecursionError, KnowEditError):
        return None


def _write(found: Config, key: str) -> Path:
    path, record = _file(type(found), key), found.to_dict()
    record |= {} if "fingerprint" in record else {"of": key}
    with atomic_file(path) as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
