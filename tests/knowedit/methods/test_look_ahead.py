"""LookAhead: lower loss than the write it starts from, less drift with more weight on what
should stay (unit).
"""

from dataclasses import replace

from knowedit.facts.fact import Fact
from knowedit.methods import LookAhead
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.task import Material
from knowedit.methods.locate.trainings import ThroughTexts
from tests.knowedit.methods.helpers import statistics_of

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
    Fact(prompt="{}, whose capital is", subject="France", target="Lyon"),
    Fact(prompt="It is said that {} plays the", subject="Miles Davis", target="violin"),
]
KEPT = ("The capital of Spain is Madrid", "Anna Bach plays the flute", "One day it rained")
TRAINING = replace(
    ThroughTexts(), parts=2, settings=replace(ThroughTexts().settings, steps=12, lr=0.5, clamp=4.0)
)


def made(model, keep):
    method = LookAhead(
        layers=(1, 2),
        target=HiddenState(steps=4, lr=0.5, clamp=2.0),
        material=Material(preserve=KEPT),
        training=replace(TRAINING, keep=keep),
    )
    return method.compute(model, FACTS, statistics_of(model, [1, 2]), progress=False)


def test_the_loss_of_the_edited_model_falls(tiny_llama):
    told = made(tiny_llama, keep=0.1).report.details["look_ahead"]
    assert told["after"]["realised"] < told["before"]["realised"]


def test_more_weight_on_what_stays_moves_it_less(tiny_llama):
    clean = tiny_llama.next_logprobs(KEPT)

    def drift(keep):
        with made(tiny_llama, keep=keep).applied_to(tiny_llama):
            return float((clean.exp() * (clean - tiny_llama.next_logprobs(KEPT))).sum(-1).mean())

    assert drift(100.0) < 0.5 * drift(0.01)
