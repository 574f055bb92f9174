"""Which implementation of an op runs, and why the others did not.

Every op has candidates in order of preference. A candidate's verifier looks at the arguments and
returns None (it can run) or the reason why it cannot. The first that can, runs. `explain` shows the
decision; a fallback from a candidate meant for the device at hand is logged once with its reason.

`KNOWEDIT_IMPL=torch` (or `KNOWEDIT_IMPL=second_moment_=torch,low_rank_update_=native`) forces a
choice; a forced candidate that cannot run raises `DispatchError` with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger("knowedit_kernels")


class DispatchError(RuntimeError):
    """No implementation of an op can run on these arguments, or the forced one cannot."""


def _anything(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Candidate:
    """One implementation: `run(*args)`, `verify(*args)` -> None or why not, `device` it is meant
    for (None: any).
    """

    name: str
    run: Callable[..., Any]
    verify: Callable[..., str | None] = _anything
    device: str | None = None


@dataclass(frozen=True)
class Decision:
    """What ran (or would run) for `op`: `chosen` is None when nothing can; `refused` holds (name,
    reason).
    """

    op: str
    chosen: str | None
    refused: tuple[tuple[str, str], ...] = ()
    not_needed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no implementation can run'}"]
        lines += [f"  refused {name}: {reason}" for name, reason in self.refused]
        lines += [f"  not needed: {name}" for name in self.not_needed]
        return "\n".join(lines)


_candidates: dict[str, list[Candidate]] = {}
_last: dict[str, Decision] = {}
_logged: set[tuple[str, str, str]] = set()


def register(op: str, *candidates: Candidate) -> None:
    """Sets the candidates of `op`, best first. Called once by the op's folder."""
    _candidates[op] = list(candidates)


def candidates(op: str) -> tuple[Candidate, ...]:
    """The registered candidates of `op`, best first. Raises `DispatchError` for an unknown op."""
    if op not in _candidates:
        raise DispatchError(f"unknown op {op!r}; known: {', '.join(sorted(_candidates)) or 'none'}")
    return tuple(_candidates[op])


def _forced(op: str) -> str | None:
    """The name KNOWEDIT_IMPL asks for; a bare name counts only for ops that have such a
    candidate.
    """
    names = {candidate.name for candidate in candidates(op)}
    for item in os.environ.get("KNOWEDIT_IMPL", "").split(","):
        target, _, name = item.strip().rpartition("=")
        if target == op and name not in names:
            raise DispatchError(
                f"KNOWEDIT_IMPL asks for {op}={name}; {op} has: {', '.join(sorted(names))}"
            )
        if name in names and target in ("", op):
            return name
    return None


def _device(args: tuple[Any, ...]) -> str | None:
    """The device type of the first tensor among the arguments, also inside a list."""
    flat = (item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return next((item.device.type for item in flat if isinstance(item, torch.Tensor)), None)


def _refusal(
    candidate: Candidate, device: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if candidate.device is not None and device is not None and candidate.device != device:
        return f"runs on {candidate.device}, the tensors are on {device}"
    return candidate.verify(*args, **kwargs)


def choose(op: str, *args: Any, **kwargs: Any) -> tuple[Candidate | None, Decision]:
    """The candidate that would run on these arguments (None if none can) and the record of the
    decision.
    """
    forced, device = _forced(op), _device(args)
    refused: list[tuple[str, str]] = []
    chosen: Candidate | None = None
    rest: list[str] = []
    for candidate in candidates(op):
        if chosen is not None:
            rest.append(candidate.name)
            continue
        if forced is not None and candidate.name != forced:
            reason: str | None = f"KNOWEDIT_IMPL asks for {forced}"
        else:
            reason = _refusal(candidate, device, args, kwargs)
        if reason is None:
            chosen = candidate
        else:
            refused.append((candidate.name, reason))
    return chosen, Decision(op, chosen.name if chosen else None, tuple(refused), tuple(rest))


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    """Runs the first candidate that can. Raises `DispatchError` with all reasons if none can."""
    chosen, decision = choose(op, *args, **kwargs)
    _last[op] = decision
    if chosen is None:
        raise DispatchError(str(decision))
    if decision.refused:
        _log_fallback(decision, _device(args))
    return chosen.run(*args, **kwargs)


def _log_fallback(decision: Decision, device: str | None) -> None:
    meant_for = {candidate.name: candidate.device for candidate in candidates(decision.op)}
    for name, reason in decision.refused:
        key = (decision.op, name, reason)
        if (
            meant_for[name] in (None, device)
            and not reason.startswith("KNOWEDIT_IMPL")
            and key not in _logged
        ):
            _logged.add(key)
            logger.info("%s: %s instead of %s (%s)", decision.op, decision.chosen, name, reason)


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Which implementation of `op` runs on these arguments and why the better ones do not; runs
    nothing.

    Without arguments: what was decided at the last call. Printing the result gives one line per
    candidate.
    """
    if args or kwargs:
        return choose(op, *args, **kwargs)[1]
    candidates(op)
    return _last.get(
        op, Decision(op, None, (("all", "not called yet; pass arguments to explain a call"),))
    )
