"""The geometry of an edit against analytic cases, and on a small model (unit)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from knowedit.errors import EditError
from knowedit.evaluation.geometry.curvature import (
    Recall,
    gradients,
    landscape,
    mean_curvature,
    tolerance,
    top_curvature,
)
from knowedit.evaluation.geometry.geometry import (
    GAIN,
    OTHER,
    amplification,
    geometry,
    ratio,
    read_in,
)
from knowedit.facts.fact import Fact
from knowedit.methods.locate.values import ValueSettings
from knowedit.models.fingerprint import weights_fingerprint
from knowedit_kernels import Covariance, Identity, NullSpace
from tests.knowedit.methods.test_locate import statistics_of

FACTS = [
    Fact("The seat of {} is in", "Bern", "Rome", "Bonn"),
    Fact("They say that in {} they speak", "Bern", "Thai", "Urdu"),
]


# -- curvature


def quadratic(eigenvalues, seed=0):
    basis = torch.linalg.qr(
        torch.randn(
            len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(seed)
        )
    )[0]
    matrix = basis @ torch.diag(torch.tensor(eigenvalues)) @ basis.T
    return matrix, lambda x: 0.5 * ((x @ matrix) * x).sum(1)


def test_curvature_of_a_quadratic():
    matrix, loss = quadratic([9.0, 3.0, 1.0, 0.5, 0.1, 0.1, 0.1, 0.1])
    at = torch.randn(3, 8)
    assert torch.allclose(top_curvature(loss, at, steps=40), torch.full((3,), 9.0), rtol=1e-4)
    assert torch.allclose(
        mean_curvature(loss, at, probes=2000), torch.full((3,), 13.9 / 8), rtol=0.05
    )
    assert torch.allclose(gradients(loss, at), at @ matrix, atol=1e-5)
    saddle = quadratic([-5.0, 2.0, 1.0])[1]
    assert torch.allclose(
        top_curvature(saddle, torch.zeros(1, 3), steps=60), torch.tensor([-5.0]), rtol=1e-4
    )


def test_tolerance_of_a_half_space():
    """Recalled while w v > 0: along a random ray w u ~ N(0, 1/hidden), so 90 % hold up to margin
    sqrt(hidden) / 1.2816.
    """
    hidden = 400
    w = torch.zeros(hidden)
    w[0] = 1
    values = torch.zeros(3, hidden)
    values[:, 0], values[:, 1] = torch.tensor([0.05, 0.02, -0.1]), 1
    found = tolerance(lambda states, _: states @ w > 0, values, directions=4000, steps=12)
    wanted = [m * math.sqrt(hidden) / 1.2816 / math.sqrt(1 + m * m) for m in (0.05, 0.02)]
    assert found[:2].tolist() == pytest.approx(wanted, rel=0.06) and found[2] == 0
    assert tolerance(lambda states, _: states[:, 1] > -9, values[:1], largest=1.5).tolist() == [1.5]


def test_recall_is_that_of_the_whole_model(tiny_llama):
    recall = Recall(tiny_llama, FACTS, 1)
    nll, exact = recall(recall.clean)
    for found, hit, fact in zip(nll, exact, FACTS):
        (wanted,) = tiny_llama.score([fact.text], [fact.target])
        assert (
            float(found) == pytest.approx(-wanted.logprob, rel=1e-4) and bool(hit) == wanted.exact
        )
    delta = torch.randn(2, tiny_llama.hidden)
    pair, _ = recall(recall.clean[[1, 1]] + delta, [1, 1])
    for found, shift in zip(pair, delta):
        row = tiny_llama.row(FACTS[1].text, FACTS[1].subject, FACTS[1].target)

        def add(_module, _inputs, output, shift=shift, at=row.subject):
            output[:, at] += shift
            return output

        handle = tiny_llama.layers[1].register_forward_hook(add)
        (wanted,) = tiny_llama.score([FACTS[1].text], [FACTS[1].target])
        handle.remove()
        assert float(found) == pytest.approx(-wanted.logprob, rel=1e-4)


def test_curvature_through_the_model_is_a_second_difference(tiny_llama):
    recall = Recall(tiny_llama, FACTS, 1)

    def loss(states):
        return recall(states)[0]

    gradient = gradients(loss, recall.clean)
    signs = (
        torch.randint(0, 2, recall.clean.shape, generator=torch.Generator().manual_seed(3)) * 2.0
        - 1
    )
    h = 1e-2
    with torch.no_grad():
        around = [loss(recall.clean + s * h * signs) for s in (-1, 0, 1)]
    slope, bend = (around[2] - around[0]) / (2 * h), (around[2] - 2 * around[1] + around[0]) / h**2
    assert torch.allclose((gradient * signs).sum(1), slope, rtol=2e-2, atol=2e-3)
    found = mean_curvature(loss, recall.clean, probes=1, seed=3) * recall.clean.shape[1]
    assert torch.allclose(found, bend, rtol=0.1, atol=0.15)
    assert (
        top_curvature(loss, recall.clean).abs() >= mean_curvature(loss, recall.clean).abs()
    ).all()


def test_a_landscape_of_several_subjects(tiny_llama):
    groups = [FACTS, [Fact("A man from {} is", "Peru", "tall", "short")]]
    values = ValueSettings(steps=6, clamp=4.0)
    found = landscape(tiny_llama, groups, 1, values)
    assert found.delta.shape == (2, tiny_llama.hidden) and found.room.shape == (3,)
    recall = Recall(tiny_llama, [*FACTS, groups[1][0]], 1)
    joint = recall.clean + found.delta[[0, 0, 1]]
    assert found.nll["joint"] == pytest.approx(float(recall(joint)[0].mean()), rel=1e-5)
    pull = gradients(lambda states: recall(states)[0], joint)
    wanted = torch.cosine_similarity(pull[0], pull[1], dim=0)
    assert found.gradient_cosine["joint"] == pytest.approx(float(wanted), rel=1e-4)
    ways = (found.tolerance, found.weakest, found.sharpness, found.roughness, found.shift)
    assert all(set(way) == {"alone", "joint"} for way in ways)
    assert all(found.weakest[n] <= found.tolerance[n] for n in found.weakest)
    assert math.isnan(landscape(tiny_llama, [g[:1] for g in groups], 1, values).delta_cosine)


# -- read-in vectors
# --------------------------------------------------------------------------------------------------


def power_law(exponent, m=2000, n=200):
    spectrum = torch.arange(1, m + 1, dtype=torch.float64) ** -exponent
    keys = (
        torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * spectrum.sqrt()[:, None]
    )
    return spectrum, keys


@pytest.mark.parametrize("exponent, wanted", [(0.5, 1.14), (1.0, 2.11), (1.5, 6.8), (2.0, 33.0)])
def test_amplification_of_power_laws(exponent, wanted):
    """Means for keys drawn from the covariance itself, as an independent numpy prototype found
    them; and their bound.
    """
    spectrum, keys = power_law(exponent)
    kappa = amplification(Covariance(torch.diag(spectrum)), keys)
    assert float(kappa.mean()) == pytest.approx(wanted, rel=0.1)
    condition = math.sqrt(2000**exponent)
    assert (
        float(kappa.min()) >= 1 and float(kappa.max()) <= (condition + 1 / condition) / 2
    )  # Kantorovich


def test_amplification_is_an_angle():
    generator = torch.Generator().manual_seed(1)
    C = torch.cov(
        torch.randn(40, 400, dtype=torch.float64, generator=generator)
        * torch.linspace(0.1, 2, 40)[:, None]
    )
    keys = torch.randn(40, 9, dtype=torch.float64, generator=generator)
    cosine = torch.cosine_similarity(keys, torch.linalg.solve(C, keys), dim=0)
    assert torch.allclose(amplification(Covariance(C), keys), 1 / cosine)
    assert torch.allclose(
        amplification(Identity(40, weight=3.0), keys), torch.ones(9, dtype=torch.float64)
    )
    null = NullSpace(C, rank=25)
    inside = torch.linalg.eigh(C)[1][:, :25]
    assert torch.allclose(
        amplification(null, keys), keys.norm(dim=0) / (inside.T @ keys).norm(dim=0)
    )
    a = read_in(Covariance(C), keys)
    assert torch.allclose((a * keys).sum(0), torch.ones(9, dtype=torch.float64))


def test_rho_tells_which_drift_a_metric_suits():
    """Isotropic drift: rho = |a_C|^2 / |a_I|^2 = kappa^2 > 1. Drift distributed like the keys: C is
    the best choice.
    """
    spectrum, keys = power_law(1.0, m=300, n=40)
    a = {
        name: read_in(metric, keys)
        for name, metric in (("C", Covariance(torch.diag(spectrum))), ("I", Identity(300)))
    }
    generator = torch.Generator().manual_seed(2)
    plain = torch.randn(300, 40, 200, dtype=torch.float64, generator=generator)
    owner = torch.arange(40).repeat_interleave(200)

    def rho(drift):
        off = {
            name: torch.einsum("mn,mnd->nd", vector, drift).square().flatten()
            for name, vector in a.items()
        }
        return ratio(off["C"], off["I"], owner)

    isotropic, alike = rho(plain), rho(plain * spectrum.sqrt()[:, None, None])
    kappa = amplification(Covariance(torch.diag(spectrum)), keys)
    expected = float((kappa / keys.norm(dim=0)).square().sum() / keys.norm(dim=0).pow(-2).sum())
    assert isotropic.mean == pytest.approx(expected, rel=0.05) and isotropic.low > 1
    assert alike.high < 1 and isotropic.low < isotropic.mean < isotropic.high
    same = ratio(torch.ones(4), torch.full((4,), 2.0), torch.tensor([0, 0, 1, 1]))
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)


# -- the whole

GROUPS = [
    [
        Fact("The seat of {} is in", "Bern", "Rome", "Bonn", relation="P36"),
        Fact("In {} they speak", "Bern", "Thai", "Urdu"),
    ],
    [Fact("A man from {} is", "Peru", "tall", "short")],
    [Fact("{} is in", "B", "C")],  # its subject is the first token: left out
]
VALUES = ValueSettings(steps=4, clamp=4.0)


def test_geometry_of_a_model(tiny_llama):
    before = weights_fingerprint(tiny_llama.hf)
    statistics = statistics_of(tiny_llama, [1, 2])
    layers = geometry(tiny_llama, GROUPS, statistics, [1, 2], VALUES, threshold=2.0)
    assert weights_fingerprint(tiny_llama.hf) == before and [one.layer for one in layers] == [1, 2]
    first = layers[0]
    assert (first.facts, first.subjects, first.edited) == (3, 2, (3, 2))
    assert (
        first.kappa["I"] == pytest.approx((1, 1))
        and first.kappa["C"][0] > 1
        and 0 < first.null[0] < first.null[1] < 1
    )
    assert {form.form for form in first.forms} == {"paraphrase", "question", "distractor", OTHER}
    # one form again, by hand
    facts = [fact for group in GROUPS[:2] for fact in group]
    bare = tiny_llama.keys([tiny_llama.row(f.text, f.subject) for f in facts], [1])[0][1].double()
    other = next(form for form in first.forms if form.form == OTHER)
    C, eps = statistics.moment(1), bare[[1, 0]] - bare[[0, 1]]
    a = torch.linalg.solve(C, bare[:2].T).T
    off = ((a / (a * bare[:2]).sum(1, keepdim=True)) * eps).sum(1)
    assert other.texts == 2 and other.gain["C"] == pytest.approx(1 + float(off.mean()))
    assert other.deviation["C"] == pytest.approx(float(off.square().mean().sqrt()))
    plain = (bare[:2] * eps).sum(1) / bare[:2].square().sum(1)
    assert other.rho["C"].mean == pytest.approx(float(off.square().sum() / plain.square().sum()))
    assert other.moved == pytest.approx(float((eps.norm(dim=1) / bare[:2].norm(dim=1)).mean()))
    # the identity's edit, densely: mean keys, ridge for the gain, drift of the cloze
    K = torch.stack([bare[:2].mean(0), bare[2]], 1)
    assert first.values is not None
    delta, weight = first.values.delta.double().T, K.square().sum(0).mean() * (1 - GAIN) / GAIN
    dense = delta @ torch.linalg.solve(weight * torch.eye(2) + K.T @ K, K.T)
    planned = delta[:, [0, 0, 1]]
    drift = (dense @ bare.T - planned).norm(dim=0) / planned.norm(dim=0)
    assert first.recall["cloze"]["I"]["drift"] == pytest.approx(float(drift.mean()), rel=1e-4)
    scores = tiny_llama.score(
        [f.text for f in facts for _ in "ab"], [o for f in facts for o in (f.target, f.true or "")]
    )
    wanted = [new.logprob > old.logprob for new, old in zip(scores[::2], scores[1::2])]
    assert first.recall["cloze"]["none"]["success"] == pytest.approx(sum(wanted) / 3)
    assert first.recall["cloze"]["none"]["outputs"] == pytest.approx(0, abs=1e-5)
    assert [name for *_, name in first.points].count("cloze") == 3 and len(first.points) == 8
    told = replace(first, points=[(1, 2, True, "a"), (1, 1, False, "a"), (3, 2, False, "b")])
    assert told.within() == {"in": 0.5, "out": 0.0}


def test_the_drift_of_keys_alone(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    (quick,) = geometry(tiny_llama, GROUPS, statistics, [1], edited=0, threshold=2.0)
    (full,) = geometry(tiny_llama, GROUPS, statistics, [1], VALUES, threshold=2.0)
    assert (
        quick.forms == full.forms
        and quick.values is None
        and quick.to_dict()["values"] == {}
        and not quick.points
    )


def test_geometry_needs_two_usable_subjects(tiny_llama):
    with pytest.raises(EditError, match="at least two subjects"):
        geometry(tiny_llama, GROUPS[1:], statistics_of(tiny_llama, [1]), [1], VALUES)
