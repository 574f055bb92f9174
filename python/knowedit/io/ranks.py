"""The processes that work together: those of `torchrun`, or this one alone.

All that they exchange goes through five collectives of torch.distributed; with one process they
cost nothing and change nothing, so that what is shared out is written once.

Key statistics are shared out wherever there is a group. What else can be, batches of rows and
single edits, is shared out within `under_torchrun` only, where every process runs the same program:
whoever has a group of their own, and measures in one process of it, must not wait for the others.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from knowedit.errors import KnowEditError, RankError


class Summed(Protocol):
    """Sums that each process has a part of."""

    def all_reduce(self) -> Any:
        """Make them everyone's, in place."""


S = TypeVar("S")
T = TypeVar("T")
M = TypeVar("M", bound=Summed)
# one rank may wait for a hub that went away, or write a large checkpoint
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process' number and how many there are.

    Raises:
        RankError: from every collective, when another rank died or is elsewhere.
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
        found: list[Any] = [None] * self.size
        number = next(_gathered)
        with _another_died():
            dist.all_gather_object(found, (number, item))
        if any(theirs != number for theirs, _ in found):
            raise RankError(
                "the ranks are not at the same place of their work (one of them met an error that "
                "the others did not); start again"
            )
        return [item for _, item in found]

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
        """What `action` returns on rank 0, on every rank; see `each`."""
        found = self.each(lambda: action() if self.rank == 0 else None)[0]
        return found  # type: ignore[return-value]

    def each(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on every rank, by rank, on every rank. It runs alone: nothing in it
        is shared out. What one rank raises is raised on all, the lowest rank's first; on the others
        what is no error of ours as a RankError with its text.
        """
        if self.size == 1:
            return [action()]
        problem: Exception | None = None
        result: Any = None
        try:
            with _among(Ranks()):
                result = action()
        except Exception as error:
            problem = error
        told = self.gather((result, _sent(problem, self.rank)))
        for rank, (_, theirs) in enumerate(told):
            if theirs is not None:
                raised = problem if rank == self.rank and problem is not None else theirs
                raised.everywhere = True  # type: ignore[attr-defined]
                raise raised
        return [found for found, _ in told]

    def share(self, items: Sequence[S], work: Callable[[S], T]) -> list[T]:
        """`work(item)` of every item, in their order, on every rank, each done by one; see `each`.

        With one rank or none to share with, this is a loop.
        """
        mine = items[self.rank :: self.size]
        parts = self.each(lambda: [work(item) for item in mine])
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def worth(self, items: int) -> float:
        """How many of so many shared items one of this rank's stands for, in a bar's progress."""
        return items / max(1, len(range(self.rank, items, self.size)))


#: How many times this process has gathered.
_gathered = count()
_sharing: ContextVar[Ranks] = ContextVar("sharing")


def team() -> Ranks:
    """The ranks that share out the work of this moment; one alone, unless `under_torchrun`."""
    return _sharing.get(Ranks())


@contextmanager
def _among(ranks: Ranks) -> Iterator[None]:
    """Within the block they are the `team`."""
    token = _sharing.set(ranks)
    try:
        yield
    finally:
        _sharing.reset(token)


@contextmanager
def under_torchrun() -> Iterator[Ranks]:
    """Within the block the processes that `torchrun` started work as one: all run the same program,
    and values, single edits, answers and texts are shared out in batches. Every process has every
    result, with the bits of one process that has as many threads.

    One process alone does all of it. Files are for rank 0 to write.
    """
    with started() as ranks, _among(ranks):
        yield ranks


def _sent(problem: Exception | None, rank: int) -> Exception | None:
    """An error as the other ranks can read it."""
    if isinstance(problem, (KnowEditError, OSError)):
        try:
            pickle.dumps(problem)  # it can go
            return copy.copy(problem)  # and be made anew there
        except Exception:  # an error that is made of more than its text
            return RankError(str(problem))
    return problem and RankError(f"{type(problem).__name__} on rank {rank}: {problem}")


@contextmanager
def started() -> Iterator[Ranks]:
    """The group that `torchrun` announced in the environment, over NCCL and gloo (with a GPU) or
    gloo; left at the end. Key statistics are shared out in it.
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
        raise RankError(
            f"another rank ended or does not answer ({str(error).splitlines()[0][:200]}); "
            "what was written is kept: start again, with as many ranks as you like"
        ) from error
