"""What is measured: an operation, one problem of it, and the providers that solve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from knowedit_kernels._dispatch import Decision

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Check:
    """One measured error against float64 and the most it may be; NaN is too much."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return abs(self.value) <= self.limit


@dataclass(frozen=True)
class Problem:
    """One case of an operation.

    `useful` are the flops that the answer needs, `nominal` those of the textbook method, `traffic`
    the bytes that must at least move to and from memory. `dtype` names the matmul ceiling a
    provider is held against. `judge(result)` gives the errors with our own limits.
    """

    shape: dict[str, int | str]
    dtype: torch.dtype
    useful: int
    nominal: int
    traffic: int
    inputs: Any
    judge: Callable[[Any], list[Check]]


def _always(inputs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to solve a problem.

    `build(inputs)` prepares fresh state and returns the function to be timed; what its *first* call
    returns is judged. `refuse(inputs)` says why it cannot run, or None. `slack` multiplies our
    limits for peers that never promised them: then the check only proves that they compute the same
    quantity.
    """

    about: str
    build: Callable[[Any], Callable[[], Any]]
    refuse: Callable[[Any], str | None] = _always
    slack: float = 1.0


@dataclass(frozen=True)
class Parameter:
    """A command-line list: its defaults on a CPU and on a GPU, and the choices if it is one of a
    few words.
    """

    cpu: tuple[int | str, ...]
    cuda: tuple[int | str, ...]
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """`make(values, device)` draws a problem from one value per parameter; `decide(problem)`
    explains the dispatch.
    """

    about: str
    parameters: dict[str, Parameter]
    make: Callable[[dict[str, Any], torch.device], Problem]
    decide: Callable[[Problem], Decision]
    providers: dict[str, Provider] = field(default_factory=dict)


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """A seeded generator on `device`."""
    return torch.Generator(device).manual_seed(seed)
