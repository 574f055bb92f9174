"""Processes that work together: what they exchange, and what one raises (unit; two processes over
gloo).
"""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from knowedit.errors import KnowEditError, RankError
from knowedit.io import ranks as module
from knowedit.io.ranks import Ranks, team, under_torchrun
from tests.processes import side_by_side


class Own(KnowEditError):
    """An error that another process cannot be sent."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def _member(rank, port, kind):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        with under_torchrun() as ranks:
            KINDS[kind](ranks)
    finally:
        dist.destroy_process_group()


def shares(ranks):
    assert team() == ranks == Ranks(ranks.rank, 2)
    found = ranks.share(range(5), lambda i: (i * i, ranks.rank, team()))
    assert found == [(i * i, i % 2, Ranks()) for i in range(5)]
    assert ranks.share([], str) == [] and ranks.share([7], str) == ["7"]
    assert ranks.first(lambda: ranks.rank) == 0
    assert ranks.each(lambda: ranks.rank) == [0, 1] and team() == ranks
    assert ranks.worth(5) == [5 / 3, 5 / 2][ranks.rank]


def raises(ranks):
    """What one rank raises is raised on all; the lowest of several; the group goes on."""

    def fail(error, *where):
        def action():
            if ranks.rank in where:
                raise error
            return "done"

        return action

    for error, where, told in (
        (KnowEditError("no such file"), (1,), KnowEditError("no such file")),
        (OSError("disk full"), (0,), OSError("disk full")),
        (KnowEditError(f"rank {ranks.rank}"), (0, 1), KnowEditError("rank 0")),
        (
            KeyError("x"),
            (1,),
            KeyError("x") if ranks.rank else RankError("KeyError on rank 1: 'x'"),
        ),
        (Own("a", "b"), (1,), Own("a", "b") if ranks.rank else RankError("a: b")),
    ):
        with pytest.raises(type(told)) as found:
            ranks.each(fail(error, *where))
        assert str(found.value) == str(told) and type(found.value) is type(told)
        assert found.value.everywhere and team() == ranks
    assert ranks.each(lambda: 1) == [1, 1]


def out_of_step(ranks):
    """Rank 1 is one exchange ahead of the other."""
    if ranks.rank == 1:
        next(module._gathered)
    with pytest.raises(RankError, match="not at the same place"):
        ranks.gather("here")


KINDS = {function.__name__: function for function in (shares, raises, out_of_step)}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    side_by_side(_member, 2, port, kind)


def test_one_process_alone_does_everything():
    with under_torchrun() as ranks:
        assert ranks == team() == Ranks()
        assert ranks.share([1, 2], lambda i: 2 * i) == [2, 4] and ranks.worth(3) == 1
        with pytest.raises(ZeroDivisionError):
            ranks.each(lambda: 1 / 0)
