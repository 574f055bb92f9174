"""The processes that collect together: those of `torchrun`, or this one alone.

All that they exchange goes through five collectives of torch.distributed; with one process they
cost nothing and change nothing, so that the collection is written once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from knowedit.errors import KnowEditError, StatisticsError
from knowedit.statistics.experts import ExpertMoment
from knowedit_kernels import SecondMoment

T = TypeVar("T")
M = TypeVar("M", SecondMoment, ExpertMoment, SecondMoment | ExpertMoment)
# one rank may wait for a hub that went away, or write a large checkpoint
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process' number and how many there are.

    Raises:
        StatisticsError: from every collective, when another rank died.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the default process group, or one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def device(self) -> dict[str, int] | None:
        """The `device_map` that puts a whole model on this process' own GPU; None without GPUs."""
        return {"": torch.cuda.current_device()} if torch.cuda.is_available() else None

    def gather(self, item: T) -> list[T]:
        """Everyone's `item`, by rank, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _another_died():
            dist.all_gather_object(items, item)
        return items

    def post(self, numbers: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Begin to send the `numbers`, of which all have as many, to every rank; what it returns
        waits for everyone's, by rank.

        No other collective may come between the two.
        """
        if self.size == 1:
            return lambda: [list(numbers)]
        cuda = "gloo" not in dist.get_backend_config()
        mine = torch.tensor(
            numbers, dtype=torch.int64, device=torch.cuda.current_device() if cuda else "cpu"
        )
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _another_died():
            work = dist.all_gather(found, mine, async_op=True)

        def wait() -> list[list[int]]:
            with _another_died():
                work.wait()
            return [row.tolist() for row in found]

        return wait

    def add(self, tensor: Tensor, owner: int) -> Tensor:
        """The sum of everyone's `tensor` on rank `owner` (in place; on the others the contents are
        then undefined).
        """
        if self.size > 1:
            with _another_died():
                dist.reduce(tensor, owner)
        return tensor

    def total(self, moment: M) -> M:
        """Everyone's sums added up, on every rank."""
        if self.size > 1:
            with _another_died():
                moment.all_reduce()
        return moment

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; a KnowEditError or OSError it raises
        there is raised on all.
        """
        found: tuple[T | None, KnowEditError | OSError | None] = (None, None)
        if self.rank == 0:
            try:
                found = (action(), None)
            except (KnowEditError, OSError) as problem:
                if self.size == 1:
                    raise
                found = (None, problem)
        result, error = self.gather(found)[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


@contextmanager
def started() -> Iterator[Ranks]:
    """The ranks that `torchrun` announced in the environment, over NCCL and gloo (with a GPU) or
    gloo; left at the end.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    # Models import it. Imported while a group is up it keeps the group for good, whose threads then
    # outlive the interpreter and abort the process now and then.
    import torch._dynamo

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT
    )
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


@contextmanager
def _another_died() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo and NCCL raise when nobody answers (any more)
        raise StatisticsError(
            f"another rank ended or does not answer ({str(error).splitlines()[0][:200]}); "
            "what was checkpointed is kept: start again, with as many ranks as you like"
        ) from error
