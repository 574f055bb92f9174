"""The barrier protocol of csrc/cuda/syrk_kernel.cuh, restated and run under random schedules: no
deadlock, no overwriting (unit).

One producer fills a ring of stages by copies that land at any time; two consumers read every stage.
Two wrong protocols show that the model can fail.
"""

import random

import pytest

STAGES, BOXES = 5, 5


class Barrier:
    """An mbarrier: a phase ends when all arrivals are in and no announced bytes (here: copies) are
    missing.
    """

    def __init__(self, arrivals):
        self.count = self.pending = arrivals
        self.missing = self.phase = 0

    def settle(self):
        if self.pending == 0 and self.missing == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def arrive(self, announce=0):
        self.missing += announce
        self.pending -= 1
        assert self.pending >= 0, "more arrivals than a phase has"
        self.settle()

    def land(self):
        self.missing -= 1
        self.settle()

    def left(self, parity):
        """Whether try_wait.parity succeeds."""
        return self.phase % 2 != parity


def ring():
    """(stage, phase) for ever, as Ring::next."""
    phase = 0
    while True:
        yield from ((stage, phase) for stage in range(STAGES))
        phase ^= 1


def producer(work, full, empty, contents, flying, first_parity):
    for item, (stage, phase) in zip(work, ring()):
        while not empty[stage].left(phase ^ first_parity):
            yield False
        full[stage].arrive(announce=BOXES)
        for box in range(BOXES):
            flying.append((stage, box, item))
            yield True


def consumer(work, full, empty, contents):
    for item, (stage, phase) in zip(work, ring()):
        while not full[stage].left(phase):
            yield False
        for _ in range(3):  # products read the stage for a while
            assert contents[stage] == [item] * BOXES, (
                "a stage was read before it was full, or overwritten while in use"
            )
            yield True
        empty[stage].arrive()


def land(flying, full, contents, choose):
    stage, box, item = flying.pop(choose.randrange(len(flying)))
    contents[stage][box] = item
    full[stage].land()


def run(seed, tiles, first_parity=1, arrivals=2):
    """Runs all actors to the end in a random order; raises AssertionError on a deadlock or a wrong
    read.
    """
    choose = random.Random(seed)
    work = [(tile, token) for tile, stages in enumerate(tiles) for token in range(stages)]
    full, empty = [Barrier(1) for _ in range(STAGES)], [Barrier(arrivals) for _ in range(STAGES)]
    contents, flying = [[None] * BOXES for _ in range(STAGES)], []
    actors = [producer(work, full, empty, contents, flying, first_parity)]
    actors += [consumer(work, full, empty, contents) for _ in range(2)]
    idle = 0
    while actors or flying:
        assert idle < 1000, "deadlock"
        idle += 1
        if flying and choose.random() < 0.3:
            land(flying, full, contents, choose)
            idle = 0
        elif actors:
            actor = choose.choice(actors)
            moved = next(actor, None)
            if moved is None:
                actors.remove(actor)
            idle = 0 if moved is not False else idle


@pytest.mark.parametrize("tiles", [[1], [5], [4, 1, 7], [12, 12, 3, 1, 1]], ids=str)
def test_every_schedule_ends_and_reads_the_right_stage(tiles):
    for seed in range(40):
        run(seed, tiles)


def test_the_model_finds_a_deadlock():
    with pytest.raises(AssertionError, match="deadlock"):
        run(0, [12], first_parity=0)


def test_the_model_finds_an_overwritten_stage():
    with pytest.raises(AssertionError):
        for seed in range(40):
            run(seed, [30], arrivals=1)
