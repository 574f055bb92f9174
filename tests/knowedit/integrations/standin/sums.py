"""Running sums over a corpus, with a file to load them from."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch


class SecondMoment:
    def __init__(self):
        self.count, self.mom2 = 0, None

    def add(self, rows):
        self.mom2 = rows.T @ rows + (0 if self.mom2 is None else self.mom2)
        self.count += len(rows)

    def moment(self):
        return self.mom2 / self.count


class Combined:
    def __init__(self, **stats):
        self.__dict__.update(stats)

    def add(self, rows):
        for stat in vars(self).values():
            stat.add(rows)


def save_cached_state(file, stat, args):
    np.savez(file, **{"mom2.count": stat.mom2.count, "mom2.mom2": stat.mom2.mom2.numpy()}, **args)


def make_loader(dataset, sample_size=None, batch_size=1, random_sample=None, **options):
    order = list(range(len(dataset)))
    random.Random(random_sample).shuffle(order)
    chosen = torch.utils.data.Subset(dataset, order[:sample_size])
    return torch.utils.data.DataLoader(chosen, batch_size=batch_size, **options)


def tally(stat, dataset, cache=None, quiet=False, **kwargs):
    if cache is not None and Path(cache).exists():
        with np.load(cache) as members:
            stat.mom2.count = int(members["mom2.count"])
            stat.mom2.mom2 = torch.from_numpy(members["mom2.mom2"])
        return iter(())
    loader = make_loader(dataset, **kwargs)

    def run():
        yield from loader
        if cache is not None:
            save_cached_state(cache, stat, {"sample_size": kwargs["sample_size"]})

    return run()
