"""What the tests of the trained methods share: facts to train on, quick trainings, a network made
by hand.
"""

import torch

from knowedit.facts.fact import Fact
from knowedit.methods.learned.loop import Plan
from knowedit.methods.learned.mend.training import MendTraining
from knowedit.methods.learned.serac.network import Scope, SeracNetwork
from knowedit.methods.learned.serac.training import SeracTraining
from knowedit.models.structure import linears

NAMES = (
    "Anna Bert Carl Dora Emil Fred Gina Hans Ivan Jane Karl Lena Mona Nils Olga Paul Rosa "
    "Sven Tina Udo Vera Wim"
).split()
PEOPLE = [
    Fact(
        ["{} lives in", "The home of {} is"][i % 2],
        name,
        ["Rome", "Oslo"][i % 3 == 0],
        true="Kiev",
        relation="home",
    )
    for i, name in enumerate(NAMES)
]
LAYERS = (2, 3)
QUICK_MEND = MendTraining(rank=8, facts=4, layers=LAYERS, plan=Plan(steps=24, lr=3e-3, validate=8))
QUICK_SERAC = SeracTraining(
    layer=1,
    gate_facts=12,
    reader_facts=4,
    gate=Plan(steps=40, lr=1e-2, validate=10),
    reader=Plan(steps=20, lr=3e-3, validate=10),
)


def network_of(model, seed=0):
    """A network whose gate lets through what is stored, word for word, and whose reader differs
    from the base.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = {
        name: tuple(
            0.3 * torch.randn(width, 2, generator=generator) for width in (width_out, width_in)
        )
        for name, (width_in, width_out) in linears(model, 2).items()
    }
    network = SeracNetwork(Scope(model.hidden, generator), 1, adapter, model.fingerprint, 6.0)
    network.report = {
        "trainable_parameters": 1,
        "facts": {"training": 1},
        "seconds": 0.0,
        "validation": {},
    }
    return network
