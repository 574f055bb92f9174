"""The training loop of the trained networks: a budget of steps, checkpoints that resume to the same
bits, Ctrl-C loses nothing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.io.config import Config, fields_of
from knowedit.io.progress import bar
from knowedit.io.ranges import Bound, Count, Positive, Whole
from knowedit.io.signals import held_back
from knowedit.io.tensors import read_file, understood, write_file

FORMAT = "knowedit-training/1"
EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class Plan(Config):
    """How long and how fast to train.

    Attributes:
        steps: of Adam; the learning rate `lr` warms up over the first `warm_up` of them and falls
            to zero at the last along a cosine.
        minutes: stop this run after so long; the next one goes on.
        clip: largest norm of the gradient.
        validate: steps between validations.
        seed: of everything random.
    """

    steps: Count
    lr: Positive
    warm_up: Whole = 20
    minutes: Positive | None = None
    clip: Bound = 1.0
    validate: Count = 100
    seed: Whole = 0

    def rate(self, step: int) -> float:
        """Learning rate of the step."""
        warm = min(1.0, (step + 1) / max(self.warm_up, 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class TrainingLog:
    """How a training went.

    Attributes:
        seconds, cpu_seconds: of all runs, by the clock and of processor time.
        curve: `[step, mean training loss since the last entry (None at first), validation loss]`.
        best: validation loss; these parameters are kept.
        running: sum and number of the training losses since the last entry.
    """

    steps: Count = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[list[float | None]] = field(default_factory=list)
    best: float = math.inf
    running: list[float] = field(default_factory=lambda: [0.0, 0.0])


def stamp(fingerprint: str, settings: Config, *material: object) -> str:
    """Names a training by model, settings (its plans' minutes do not count) and what it is trained
    on.
    """
    plans = [n for n in fields_of(type(settings)) if isinstance(getattr(settings, n), Plan)]
    timeless = settings.with_settings({f"{name}.minutes": None for name in plans}).to_dict()
    named = repr((fingerprint, timeless, material))
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


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
) -> TrainingLog:
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
    log, best = TrainingLog(), {name: p.detach().clone() for name, p in parameters.items()}
    if checkpoint.exists():
        log, best = _resume(checkpoint, stamp, plan, parameters, optimiser)
    start, cpu, before = time.monotonic(), time.process_time(), (log.seconds, log.cpu_seconds)
    saved = start

    def checkpointed() -> None:
        log.seconds, log.cpu_seconds = (
            before[0] + time.monotonic() - start,
            before[1] + time.process_time() - cpu,
        )
        _save(checkpoint, stamp, log, parameters, optimiser, best)

    def measure() -> None:
        found, (total, count) = validate(), log.running
        with held_back():  # a validation that is in the curve has its parameters kept
            log.curve.append([log.steps, total / count if count else None, found])
            log.running = [0.0, 0.0]
            if found < log.best:
                log.best = found
                best.update({name: p.detach().clone() for name, p in parameters.items()})

    with bar(title, plan.steps, "steps", show=progress) as advance:
        advance(log.steps, f"validation {log.best:.3f}")
        try:
            while True:
                due = log.steps % plan.validate == 0 or log.steps == plan.steps
                if due and not (log.curve and log.curve[-1][0] == log.steps):
                    # here, not after the step: one that was interrupted is made up for
                    measure()
                if log.steps == plan.steps:
                    break
                for group in optimiser.param_groups:
                    group["lr"] = plan.rate(log.steps)
                optimiser.zero_grad()
                value = loss(log.steps)
                if not bool(value.isfinite()):
                    raise EditError(
                        f"{title}: the loss is {value.item()} at step {log.steps}; lower the "
                        f"learning rate"
                    )
                value.backward()
                nn.utils.clip_grad_norm_(parameters.values(), plan.clip)
                with held_back():  # a step is taken and counted, or neither
                    optimiser.step()
                    log.steps += 1
                    log.running = [log.running[0] + float(value.detach()), log.running[1] + 1]
                advance(1, f"validation {log.best:.3f}")
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
    if log.steps == plan.steps and not keep:
        checkpoint.unlink()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    return log


def _save(
    path: Path,
    stamp: str,
    log: TrainingLog,
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
            f"{name}:{part}": tensor for part, tensor in parts.items() if tensor is not None
        }
    header = {"format": FORMAT, "stamp": stamp, "course": asdict(log)}
    write_file(path, tensors, header)


def _resume(
    path: Path,
    stamp: str,
    plan: Plan,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Adam,
) -> tuple[TrainingLog, dict[str, Tensor]]:
    header, tensors = read_file(path, FORMAT, "a training checkpoint")
    if header.get("stamp") != stamp:
        raise EditError(
            f"{path} is of a training with another model, other facts or other settings; remove "
            f"it to start anew"
        )
    with understood(path, "a training checkpoint"):
        log = _course(header["course"], plan)
        return _continued(log, tensors, parameters, optimiser)


def _course(record: Mapping[str, Any], plan: Plan) -> TrainingLog:
    """How a training went so far. Raises an error of any kind for what cannot be gone on from."""
    log = TrainingLog(**{one.name: record[one.name] for one in fields(TrainingLog)})
    if type(log.steps) is not int or not 0 <= log.steps <= plan.steps:
        raise ValueError(f"steps is {log.steps!r}, of {plan.steps}")
    losses = [value for row in log.curve for value in row if value is not None]
    for value in (log.seconds, log.cpu_seconds, log.best, *log.running, *losses):
        if type(value) not in (int, float) or math.isnan(value):
            raise TypeError(f"its course has {value!r} in the place of a number")
    if not isinstance(log.curve, list) or {len(row) for row in log.curve} - {3}:
        raise ValueError(f"curve is {log.curve!r:.80}, not rows of three")
    if log.best != min((row[2] for row in log.curve if row[2] is not None), default=math.inf):
        raise ValueError(f"best is {log.best}, which is not the lowest of the curve")
    if not isinstance(log.running, list) or len(log.running) != 2:
        raise ValueError(f"running is {log.running!r}, not a sum and a number")
    return log


def _continued(
    log: TrainingLog,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Adam,
) -> tuple[TrainingLog, dict[str, Tensor]]:
    """What a checkpoint's tensors say, put into parameters and optimiser."""
    best = {}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"{name}:now"])
        best[name] = tensors[f"{name}:best"].to(parameter.device)
        if log.steps:
            mean, square = (
                tensors[f"{name}:{part}"].to(parameter.device) for part in ("mean", "square")
            )
            optimiser.state[parameter] = {
                "step": torch.tensor(float(log.steps)),
                "exp_avg": mean,
                "exp_avg_sq": square,
            }
    return log, best
