"""One training loop for learned editors: a budget of steps, checkpoints that resume to the same
bits, Ctrl-C loses nothing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.io.files import cache_dir
from knowedit.io.progress import bar
from knowedit.io.tensors import read_file, write_file
from knowedit.models.editable import EditableModel

FORMAT = "knowedit-training/1"
EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        steps: of Adam; the learning rate `lr` warms up over the first `warm_up` of them and falls
            to zero at the last along a cosine.
        minutes: stop this run after so long; the next one goes on.
        clip: largest norm of the gradient.
        validate: steps between validations.
        seed: of everything random.
    """

    steps: int
    lr: float
    warm_up: int = 20
    minutes: float | None = None
    clip: float = 1.0
    validate: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.validate < 1
            or self.lr <= 0
            or (self.minutes is not None and self.minutes <= 0)
        ):
            raise EditError(f"steps, validate, lr and minutes must be positive, got {self}")

    def rate(self, step: int) -> float:
        """Learning rate of the step."""
        warm = min(1.0, (step + 1) / max(self.warm_up, 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class Course:
    """How a training went.

    Attributes:
        seconds, cpu_seconds: of all runs, by the clock and of processor time.
        curve: `[step, mean training loss since the last entry (None at first), validation loss]`.
        best: validation loss; these parameters are kept.
        running: sum and number of the training losses since the last entry.
    """

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[list[float | None]] = field(default_factory=list)
    best: float = math.inf
    running: list[float] = field(default_factory=lambda: [0.0, 0.0])


def stamp(fingerprint: str, settings: Any, *material: object) -> str:
    """Names a training by model, settings (a dataclass; its plans' minutes do not count) and what
    it is trained on.
    """
    timeless = {
        name: replace(v, minutes=None) if isinstance(v, Plan) else v
        for name, v in vars(settings).items()
    }
    return hashlib.blake2b(
        repr((fingerprint, timeless, material)).encode(), digest_size=16
    ).hexdigest()


def default_file(kind: str, model: EditableModel) -> Path:
    """Where the trained network of a model is looked for when no file is named."""
    return cache_dir("networks") / f"{kind}-{model.fingerprint}.safetensors"


def read_network(
    kind: str, path: str | Path | None, model: EditableModel, form: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a trained network's file (format `form`); no path: the one in the cache
    folder.

    Raises:
        EditError: missing, damaged, or trained for another model; the message names the command
            that trains one.
    """
    path = Path(path) if path is not None else default_file(kind, model)
    if not path.is_file():
        raise EditError(
            f"{path}: no trained {kind.upper()} network; train one with: knowedit train {kind} "
            f"{model.name}"
        )
    header, tensors = read_file(path, form, f"a {kind.upper()} network")
    check_network(kind, header["fingerprint"], model)
    return header, tensors


def check_network(kind: str, fingerprint: str, model: EditableModel) -> None:
    """Raise EditError when a network of that fingerprint was not trained for `model`."""
    if fingerprint != model.fingerprint:
        raise EditError(
            f"the {kind.upper()} network was trained for a model with fingerprint "
            f"{fingerprint[:12]}, but {model.name} has "
            f"{model.fingerprint[:12]}: other weights or another dtype; train one with: "
            f"knowedit train {kind} {model.name}"
        )


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    validate: Callable[[], float],
    plan: Plan,
    checkpoint: Path,
    stamp: str,
    *,
    keep: bool = False,
    title: str = "training",
    progress: bool = True,
) -> Course:
    """Train in place and leave the parameters of the best validation.

    Args:
        loss: of step n; what it draws at random depends on n and the seed only, which is what makes
            a resumed run equal to one that was never stopped, bit for bit.
        checkpoint: written about once a minute and when interrupted; kept when time runs out before
            the steps, else removed, unless `keep`.
        stamp: names model, facts and settings; a checkpoint with another stamp is an error.

    Raises:
        EditError: a checkpoint of another training, or a loss that is not finite.
            KeyboardInterrupt: after a checkpoint.
    """
    optimiser = torch.optim.Adam(parameters.values(), lr=plan.lr)
    course, best = Course(), {name: p.detach().clone() for name, p in parameters.items()}
    if checkpoint.exists():
        course, best = _resume(checkpoint, stamp, parameters, optimiser)
    start, cpu, before = time.monotonic(), time.process_time(), (course.seconds, course.cpu_seconds)
    saved = start

    def checkpointed() -> None:
        course.seconds, course.cpu_seconds = (
            before[0] + time.monotonic() - start,
            before[1] + time.process_time() - cpu,
        )
        _save(checkpoint, stamp, course, parameters, optimiser, best)

    def look() -> None:
        found, (total, count) = validate(), course.running
        course.curve.append([course.steps, total / count if count else None, found])
        course.running = [0.0, 0.0]
        if found < course.best:
            course.best = found
            best.update({name: p.detach().clone() for name, p in parameters.items()})

    with bar(title, plan.steps, "steps", show=progress) as advance:
        advance(course.steps, f"validation {course.best:.3f}")
        try:
            while True:
                due = course.steps % plan.validate == 0 or course.steps == plan.steps
                if due and not (course.curve and course.curve[-1][0] == course.steps):
                    look()  # here, and not behind the step: one that was interrupted is made up for
                if course.steps == plan.steps:
                    break
                for group in optimiser.param_groups:
                    group["lr"] = plan.rate(course.steps)
                optimiser.zero_grad()
                value = loss(course.steps)
                if not bool(value.isfinite()):
                    raise EditError(
                        f"{title}: the loss is {value.item()} at step {course.steps}; lower the "
                        f"learning rate"
                    )
                value.backward()
                nn.utils.clip_grad_norm_(parameters.values(), plan.clip)
                optimiser.step()
                course.steps += 1
                course.running = [course.running[0] + float(value.detach()), course.running[1] + 1]
                advance(1, f"validation {course.best:.3f}")
                now = time.monotonic()
                if plan.minutes is not None and now - start > 60 * plan.minutes:
                    break
                if now - saved > EVERY:
                    checkpointed()
                    saved = now
        except KeyboardInterrupt:
            checkpointed()
            raise
    checkpointed()
    if course.steps == plan.steps and not keep:
        checkpoint.unlink()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    return course


def _save(
    path: Path,
    stamp: str,
    course: Course,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Adam,
    best: Any,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimiser.state.get(parameter, {})
        parts = {
            "now": parameter.detach(),
            "best": best[name],
            "mean": state.get("exp_avg"),
            "square": state.get("exp_avg_sq"),
        }
        tensors |= {
            f"{name}:{part}": tensor
            for part, tensor in parts.items()
            if tensor is not None
        }
    header = {"format": FORMAT, "stamp": stamp, "course": asdict(course)}
    write_file(path, tensors, header)


def _resume(
    path: Path, stamp: str, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Adam
) -> tuple[Course, dict[str, Tensor]]:
    header, tensors = read_file(path, FORMAT, "a training checkpoint")
    if header["stamp"] != stamp:
        raise EditError(
            f"{path} is of a training with another model, other facts or other settings; remove "
            f"it to start anew"
        )
    course, best = Course(**header["course"]), {}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"{name}:now"])
        best[name] = tensors[f"{name}:best"].to(parameter.device)
        if course.steps:
            mean, square = (
                tensors[f"{name}:{part}"].to(parameter.device) for part in ("mean", "square")
            )
            optimiser.state[parameter] = {
                "step": torch.tensor(float(course.steps)),
                "exp_avg": mean,
                "exp_avg_sq": square,
            }
    return course, best
