"""Low curvature on both sides (CrispEdit's idea): its moments, its formula in float64, and steps
that stay within (unit).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from knowedit.errors import EditError
from knowedit.methods import CrispEdit
from knowedit.methods.locate.gradients import gradient_moments
from knowedit.methods.locate.metrics import LowCurvature
from knowedit.methods.locate.training import TrainingSettings
from knowedit.methods.locate.trainings import ThroughSolver
from knowedit.methods.registry import make_method
from tests.knowedit.methods.helpers import FACTS, MEAN, VALUES, pair, statistics_of, target_of
from tests.knowedit.methods.test_published import alphaedit, inputs

TEXTS = [list(b"the sea is wet and the sky is blue."), list(b"a cat sat on the mat"), [65, 66]]


@pytest.fixture
def moment(tiny_llama):
    torch.manual_seed(1)
    gradients = torch.randn(200, tiny_llama.hidden, dtype=torch.float64)
    gradients *= torch.linspace(0.1, 3, tiny_llama.hidden)
    return gradients.T @ gradients / 200


def high(matrix):
    """The eigenvectors from the mean eigenvalue on."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[:, values >= values.mean()]


def test_gradient_moments_are_those_of_each_text_alone(tiny_gpt2, tiny_llama):
    for model in (tiny_gpt2, tiny_llama):
        rows = []
        for ids in TEXTS:
            probe = torch.zeros(1, len(ids), model.hidden, requires_grad=True)
            handle = model.projection(2).register_forward_hook(lambda m, i, out, p=probe: out + p)
            logits = model.hf(input_ids=torch.tensor([ids])).logits[0, :-1]
            handle.remove()
            cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").backward()
            rows.append(probe.grad[0, 1:-1].double())
        wanted = torch.cat(rows)
        found = gradient_moments(model, [1, 2], TEXTS, budget=40)[2]
        error = (found - wanted.T @ wanted / len(wanted)).norm()
        assert error <= 1e-4 * found.norm() > 0


def test_the_update_is_projected_on_both_sides(tiny_llama, moment):
    """AlphaEdit's formula behind a projection of the outputs, in float64; no direction in which C
    or G is high is left in it, and its curvature is below the product of the limits.
    """
    statistics = statistics_of(tiny_llama, [1])
    metric = LowCurvature(weight=10.0, gradients={1: moment})
    editor = CrispEdit(
        layers=(1,), target=target_of(VALUES), metric=metric, keys=MEAN, training=None
    )
    made = editor.compute(tiny_llama, FACTS, statistics, progress=False)
    ((_, K, R, _),) = inputs(tiny_llama, editor, FACTS, made, (1,))
    C, steep = statistics.moment(1), high(moment)
    Pg = torch.eye(len(moment), dtype=torch.float64) - steep @ steep.T
    wanted = Pg @ alphaedit(C, K, R, threshold=float(C.diagonal().mean()))
    delta = made.delta(1).double()
    assert (delta - wanted).norm() <= 1e-6 * wanted.norm() > 0
    assert (steep.T @ delta).norm() <= 1e-6 * delta.norm()
    assert (delta @ high(C)).norm() <= 1e-6 * delta.norm()
    curvature = torch.trace(moment @ delta @ C @ delta.T) / delta.square().sum()
    assert curvature < moment.diagonal().mean() * C.diagonal().mean()
    everything = replace(editor, metric=replace(metric, curved=1e9))
    free = everything.compute(tiny_llama, FACTS, statistics, progress=False).delta(1).double()
    assert (steep.T @ free).norm() > 0.1 * free.norm()


def test_every_step_of_the_training_stays_within(tiny_llama, moment, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The sea is wet, and the sky above it is blue. " * 6)
    statistics = statistics_of(tiny_llama, [1])
    training = ThroughSolver(when="always", settings=TrainingSettings(steps=2))
    editor = CrispEdit(
        layers=(1,), target=target_of(VALUES), metric=LowCurvature(tokens=200), training=training
    ).with_corpus(str(file))
    assert editor.metric.corpus == str(file) and make_method(editor.to_dict()) == editor
    made = editor.compute(tiny_llama, FACTS, statistics, progress=False)
    left, _ = pair(tiny_llama, made, 1)
    plain = replace(editor, training=None).compute(tiny_llama, FACTS, statistics, progress=False)
    start, _ = pair(tiny_llama, plain, 1)
    given = replace(editor, metric=LowCurvature(gradients={1: moment}))
    told, _ = pair(tiny_llama, given.compute(tiny_llama, FACTS, statistics, progress=False), 1)
    assert (left - start).norm() > 1e-3 * start.norm()
    assert (high(moment).T @ told.double()).norm() <= 1e-5 * told.norm()
    assert (high(moment).T @ left.double()).norm() > 1e-2 * left.norm()  # of other gradients


def test_what_has_no_curvature_is_refused(tiny_llama, monkeypatch):
    with pytest.raises(EditError, match=r"5 tokens are too few .* of 32 outputs.*metric.tokens"):
        gradient_moments(tiny_llama, [1], [list(b"the sea")])
    monkeypatch.setattr(type(tiny_llama.layout), "experts", lambda self, layer: "some")
    with pytest.raises(EditError, match="routed experts .layer 1. is not known"):
        gradient_moments(tiny_llama, [1], TEXTS)
