"""Which implementation of an op runs, and why the others did not.

Every op has candidates in order of preference. A candidate's verifier looks at the arguments and
returns None (it can run) or the reason why it cannot. The first that can, runs. `explain` shows the
decision; a fallback from a candidate meant for the device at hand is logged once with its reason.

`KNOWEDIT_IMPL=torch` (or `KNOWEDIT_IMPL=second_moment_=torch,low_rank_update_=native`) forces a
choice; a forced candidate that cannot run raises `DispatchError` with its reason, an unknown name
one with those that are known.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from knowedit_kernels import _modes

logger = logging.getLogger("knowedit_kernels")


class DispatchError(RuntimeError):
    """No implementation of an op can run on these arguments, or the forced one cannot."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of an op, in the order of its schema. Every op has a subclass, in its folder's
    `call.py`, and every implementation takes one.
    """

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The values in the order of the schema."""
        return tuple(vars(self).values())

    def check(self) -> None:
        """Raises ValueError for numbers that the op cannot work with. What shapes and dtypes tell
        is checked by the public function; reading numbers, which a compiled graph cannot do, is
        left to the op itself.
        """


def _anything(call: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Candidate:
    """One implementation: `run(call)`, `verify(call)` -> None or why not, `device` it is meant for
    (None: any).
    """

    name: str
    run: Callable[[Any], Any]
    verify: Callable[[Any], str | None] = _anything
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


_Refused = tuple[tuple[str, str], ...]  # (name, reason)
Choice = tuple[Candidate | None, _Refused]  # what runs, and why not those before it
_calls: dict[str, type[Call]] = {}
_candidates: dict[str, list[Candidate]] = {}
_last: dict[str, Choice] = {}  # what `_choose` said
_logged: set[tuple[object, ...]] = set()


def register(op: str, call: type[Call], *candidates: Candidate) -> None:
    """Sets the candidates of `op`, best first, and what they take. Called once by the op's
    folder.
    """
    _calls[op] = call
    _candidates[op] = list(candidates)


def candidates(op: str) -> tuple[Candidate, ...]:
    """The registered candidates of `op`, best first. Raises `DispatchError` for an unknown op."""
    if op not in _candidates:
        raise DispatchError(f"unknown op {op!r}; known: {', '.join(sorted(_candidates)) or 'none'}")
    return tuple(_candidates[op])


def _forced(op: str) -> str | None:
    """The name KNOWEDIT_IMPL asks for; a bare name counts only for ops that have such a candidate.
    Raises `DispatchError` for one that there is not.
    """
    wish = os.environ.get("KNOWEDIT_IMPL")
    if not wish:
        return None
    names = _names(op)
    asked = [item.strip().rpartition("=") for item in wish.split(",")]
    for target, _, name in asked:
        _check_known(target, name)
    return next((name for to, _, name in asked if name in names and to in ("", op)), None)


def _names(op: str) -> set[str]:
    return {candidate.name for candidate in candidates(op)}


def _check_known(op: str, name: str) -> None:
    """Raises `DispatchError` for an item of KNOWEDIT_IMPL that names what no op has."""
    if op and op not in _candidates:
        known = ", ".join(sorted(_candidates))
        raise DispatchError(f"KNOWEDIT_IMPL asks for {op}={name}; the ops are: {known}")
    names = _names(op) if op else set().union(*map(_names, _candidates))
    if (name or op) and name not in names:
        item, whose = (f"{op}={name}", op) if op else (name, "an op")
        known = ", ".join(sorted(names))
        raise DispatchError(f"KNOWEDIT_IMPL asks for {item}; {whose} has: {known}")


def _device(call: Call) -> str | None:
    """The device type of the first tensor among the arguments, also inside a list."""
    for argument in vars(call).values():
        for item in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(item, torch.Tensor):
                return item.device.type
    return None


def _refusal(candidate: Candidate, device: str | None, call: Call) -> str | None:
    if candidate.device is not None and device is not None and candidate.device != device:
        return f"runs on {candidate.device}, the tensors are on {device}"
    return candidate.verify(call)


def _call(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    candidates(op)
    return _calls[op](*args, **kwargs)


def choose(op: str, call: Call) -> tuple[Candidate | None, Decision]:
    """The candidate that would run `call` (None if none can) and the record of the decision."""
    chosen, refused = _choose(op, call, _device(call))
    return chosen, _decision(op, chosen, refused)


def decide(op: str, call: Call) -> Choice:
    """What `run` would decide."""
    return _choose(op, call, _device(call))


def note(op: str, choice: Choice) -> None:
    """For `explain`: what has run `op` without `run`."""
    _last[op] = choice


def _choose(op: str, call: Call, device: str | None) -> Choice:
    """The first candidate that can run `call`, None if none can, and why not those before it."""
    forced = _forced(op)
    refused: list[tuple[str, str]] = []
    for candidate in _candidates[op]:
        if forced is not None and candidate.name != forced:
            reason: str | None = f"KNOWEDIT_IMPL asks for {forced}"
        else:
            reason = _refusal(candidate, device, call)
        if reason is None:
            return candidate, tuple(refused)
        refused.append((candidate.name, reason))
    return None, tuple(refused)


def _decision(op: str, chosen: Candidate | None, refused: _Refused) -> Decision:
    names = [candidate.name for candidate in candidates(op)]
    rest = names[names.index(chosen.name) + 1 :] if chosen else ()
    return Decision(op, chosen.name if chosen else None, refused, tuple(rest))


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    """Runs the first candidate that can, in the arithmetic the op promises. Raises `DispatchError`
    with all reasons if none can, and what `Call.check` raises.
    """
    call = _call(op, args, kwargs)
    call.check()
    device = _device(call)
    chosen, refused = _last[op] = _choose(op, call, device)
    if chosen is None:
        raise DispatchError(str(_decision(op, chosen, refused)))
    if refused:
        _log_fallback(op, chosen, refused, device)
    with _modes.without_autocast(device):
        return chosen.run(call)


def _log_fallback(op: str, chosen: Candidate, refused: _Refused, device: str | None) -> None:
    known = (op, refused, device)
    if known in _logged:
        return
    _logged.add(known)
    meant_for = {candidate.name: candidate.device for candidate in candidates(op)}
    for name, reason in refused:
        key = (op, name, reason)
        if (
            meant_for[name] in (None, device)
            and not reason.startswith("KNOWEDIT_IMPL")
            and key not in _logged
        ):
            _logged.add(key)
            logger.info("%s: %s instead of %s (%s)", op, chosen.name, name, reason)


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Which implementation of `op` runs on these arguments and why the better ones do not; runs
    nothing.

    Without arguments: what was decided at the last call. Printing the result gives one line per
    candidate.
    """
    if args or kwargs:
        return choose(op, _call(op, args, kwargs))[1]
    candidates(op)
    if op not in _last:
        return Decision(op, None, (("all", "not called yet; pass arguments to explain a call"),))
    return _decision(op, *_last[op])
