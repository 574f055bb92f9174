"""Each method against its published formula, restated densely in float64 on the same keys and
residuals, and without the known faults of the published codes (unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.edits.history import History
from knowedit.errors import EditError, StatisticsError
from knowedit.facts.fact import Fact
from knowedit.methods import EMMET, MEMIT, ROME, AlphaEdit, BetaEdit, MEMITMerge, make_method
from knowedit.methods.locate.keys import group_by_subject, group_keys
from knowedit.methods.locate.metrics import Covariance, Exact, NullSpace
from knowedit.methods.locate.targets import AnchoredState
from knowedit.methods.locate.task import Task
from knowedit.models.presets import preset_for
from knowedit.statistics import KeyStatistics
from tests.knowedit.methods.helpers import FACTS, MEAN, SAME, VALUES, pair, statistics_of, target_of

LAYERS = (1, 2)


def inputs(model, editor, facts, made, layers=LAYERS):
    """Per layer: keys `[d_ff, n]`, residuals `[hidden, n]` for the whole distance, and how many
    layers are left.
    """
    groups = group_by_subject(facts, editor.merge_subjects)
    task_targets = editor.target.values(task_of(model, editor, groups, layers))
    for i, layer in enumerate(layers):
        with model.virtual({below: pair(model, made, below) for below in layers[:i]}):
            found = group_keys(model, groups, layer, layers[-1], editor.target.contexts)
        yield layer, found.keys.T, (task_targets.wanted - found.outputs).T, len(layers) - i


def task_of(model, editor, groups, layers):
    values = editor.target.resolved(preset_for(model), editor.runtime)
    return Task("a method", model, groups, layers, values, KeyStatistics({}), progress=False)


def memit(C, K, R, weight=7.0):
    return R @ torch.linalg.solve(weight * C + K @ K.T, K).T


def emmet(C, K, R, ridge=0.0):
    X = torch.linalg.inv(C) @ K
    return R @ torch.linalg.inv(K.T @ X + ridge * torch.eye(K.shape[1], dtype=K.dtype)) @ X.T


def alphaedit(C, K, R, cache=0.0, threshold=1.0, beta=10.0):
    U, S, _ = torch.linalg.svd(C)
    P = U[:, threshold > S] @ U[:, threshold > S].T
    return torch.linalg.solve(
        P @ (K @ K.T + cache) + beta * torch.eye(len(C), dtype=C.dtype), P @ K @ R.T
    ).T


CASES = {
    "MEMIT": (MEMIT(metric=Covariance(weight=7.0), keys=MEAN, merge_subjects=False), memit, FACTS),
    "MEMIT, duplicate keys": (
        MEMIT(metric=Covariance(weight=7.0), keys=MEAN, merge_subjects=False),
        memit,
        [*FACTS, SAME],
    ),
    "MEMIT-Merge": (MEMITMerge(metric=Covariance(weight=7.0)), memit, [*FACTS, SAME]),
    "EMMET": (EMMET(), emmet, FACTS),
    "EMMET with a ridge": (
        EMMET(metric=Exact(ridge=0.1)),
        lambda C, K, R: emmet(C, K, R, 0.1),
        FACTS,
    ),
    "AlphaEdit": (
        AlphaEdit(metric=NullSpace(weight=10.0, threshold=1.0), keys=MEAN),
        alphaedit,
        FACTS,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
def test_the_published_formula(request, tiny, case):
    model, statistics = (
        request.getfixturevalue(tiny),
        statistics_of(request.getfixturevalue(tiny), LAYERS),
    )
    settings, formula, facts = CASES[case]
    editor = replace(settings, layers=LAYERS, target=target_of(VALUES))
    made = editor.compute(model, facts, statistics, progress=False)
    for layer, K, R, remaining in inputs(model, editor, facts, made):
        wanted = formula(statistics.moment(layer), K, R / remaining)
        assert (made.delta(layer) - wanted).norm() <= 1e-6 * wanted.norm()


def test_alphaedit_with_history_is_the_released_code(tiny_llama):
    """`cache_c` is the sum of K Kᵀ over earlier batches; ours keeps the keys."""
    statistics, history = statistics_of(tiny_llama, [1]), History(tiny_llama.fingerprint)
    editor = AlphaEdit(
        layers=(1,),
        target=target_of(VALUES),
        metric=NullSpace(weight=10.0, threshold=1.0),
        keys=MEAN,
    )
    cache = torch.zeros(tiny_llama.d_ff, tiny_llama.d_ff, dtype=torch.float64)
    for fact in FACTS:
        made = editor.compute(tiny_llama, [fact], statistics, history=history, progress=False)
        ((layer, K, R, _),) = inputs(tiny_llama, editor, [fact], made, (1,))
        wanted = alphaedit(statistics.moment(layer), K, R, cache)
        assert (made.delta(layer) - wanted).norm() <= 1e-6 * wanted.norm()
        made.apply(tiny_llama)
        history.add(made)
        cache += K @ K.T
    for edit in history.edits:
        edit.undo(tiny_llama)


def betaedit(C, K, R, P, cache, leak, beta):
    inner = P @ (K @ K.T + cache + leak * C) + beta * torch.eye(len(C), dtype=C.dtype)
    return torch.linalg.solve(inner, P @ K @ R.T).T


@pytest.mark.parametrize("refresh", [False, True])
def test_betaedit_with_history_is_the_published_formula(tiny_llama, refresh):
    """With the price as published; the refreshed null space is of C and K Kᵀ of one trace."""
    statistics, history = statistics_of(tiny_llama, [1]), History(tiny_llama.fingerprint)
    C = statistics.moment(1)
    mean = float(C.diagonal().mean())
    metric = NullSpace(weight=10.0, leak=2.0, refresh=refresh)
    editor = BetaEdit(layers=(1,), target=target_of(VALUES), metric=metric, keys=MEAN)
    cache, spaces = torch.zeros_like(C), []
    for fact in FACTS:
        made = editor.compute(tiny_llama, [fact], statistics, history=history, progress=False)
        ((layer, K, R, _),) = inputs(tiny_llama, editor, [fact], made, (1,))
        trace = float(cache.diagonal().sum())
        both = (C + cache * float(C.diagonal().sum()) / trace) / 2 if refresh and trace else C
        values, vectors = torch.linalg.eigh(both)
        P = vectors[:, values < mean] @ vectors[:, values < mean].T
        wanted = betaedit(C, K, R, P, cache, 10 * 2 / mean, 10.0)
        assert (made.delta(layer) - wanted).norm() <= 1e-6 * wanted.norm() > 0
        chosen = made.report.layers["1"]
        assert chosen["lambda1"] == pytest.approx(20 / mean) and chosen["beta"] == 10
        spaces.append(P)
        made.apply(tiny_llama)
        history.add(made)
        cache += K @ K.T
    assert ((spaces[0] - spaces[-1]).norm() > 0.1) == refresh
    if refresh:
        with pytest.raises(EditError, match="changes with the history.*without refresh"):
            editor.removal(tiny_llama, history.find(FACTS[:1]), statistics, history)
    for edit in history.edits:
        edit.undo(tiny_llama)
    with pytest.raises(EditError, match="leak must not be negative"):
        NullSpace(leak=-1)


def test_norm_anchoring_is_one_line_on_the_value(tiny_llama):
    """`v* <- norm v* / |v*|`; the norm is the mean of the unedited model's, and stays it."""
    statistics = statistics_of(tiny_llama, [1])
    plain = MEMIT(layers=(1,), target=target_of(BARE))
    editor = replace(plain, target=target_of(BARE, AnchoredState))
    v0 = group_keys(tiny_llama, [[f] for f in FACTS], 1, 1, ("{}",), of_mlp=True).outputs.double()
    groups = [[fact] for fact in FACTS]
    free = plain.target.values(task_of(tiny_llama, plain, groups, (1,)))
    value = v0 + free.delta
    norm = value.norm(dim=1).mean()
    wanted = norm * value / value.norm(dim=1, keepdim=True) - v0
    found = editor.target.values(task_of(tiny_llama, editor, groups, (1,)))
    torch.testing.assert_close(found.delta.double(), wanted, rtol=1e-6, atol=1e-6)
    history = History(tiny_llama.fingerprint)
    first = editor.compute(tiny_llama, FACTS[:2], statistics, progress=False)
    with first.applied_to(tiny_llama):
        history.add(first)
        second = editor.compute(tiny_llama, FACTS[2:], statistics, history=history, progress=False)
    kept = second.report.details["anchored_norm"]
    assert (
        kept
        == first.report.details["anchored_norm"]
        == pytest.approx(float(value[:2].norm(dim=1).mean()), rel=1e-5)
    )
    given = replace(editor, target=replace(editor.target, norm=3.0))
    targets = given.target.values(task_of(tiny_llama, given, groups, (1,)))
    torch.testing.assert_close((v0 + targets.delta).norm(dim=1), torch.full((3,), 3.0).double())
    assert make_method(given.to_dict()) == given
    with pytest.raises(EditError, match="anchored-state.norm must be positive"):
        AnchoredState(norm=0)


def test_alphaedit_writes_nothing_where_c_is_large(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    made = AlphaEdit(layers=(1,), target=target_of(VALUES)).compute(
        tiny_llama, FACTS, statistics, progress=False
    )
    values, vectors = torch.linalg.eigh(statistics.moment(1))
    chosen = made.report.layers["1"]
    assert chosen["threshold"] == pytest.approx(float(values.mean())) and chosen["beta"] > 0
    kept = vectors[:, values > chosen["threshold"]]
    assert kept.shape[1] == tiny_llama.d_ff - chosen["null_directions"] > 0
    assert (made.delta(1).double() @ kept).norm() <= 1e-6 * made.delta(1).norm()


@pytest.mark.parametrize("gain", [0.5, 0.98])
def test_beta_follows_from_the_gain(tiny_llama, gain):
    editor = AlphaEdit(
        layers=(1,), target=target_of(VALUES), metric=NullSpace(gain=gain), keys=MEAN
    )
    made = editor.compute(tiny_llama, FACTS[:1], statistics_of(tiny_llama, [1]), progress=False)
    assert made.report.layers["1"]["gain"] == pytest.approx(gain, abs=1e-6)


TWINS = [
    Fact(prompt="Today {} is in", subject="Oslo", target="Peru"),
    Fact(prompt="Today {} has much", subject="Oslo", target="sand"),
]  # nothing differs up to the subject's last token: one key
BARE = replace(VALUES, contexts=("{}",))


def test_separate_values_at_one_key_end_at_their_mean(tiny_llama):
    """What MEMIT-Merge is for."""
    statistics, wanted = statistics_of(tiny_llama, [1]), {}
    for editor in (
        MEMIT(metric=Covariance(weight=1e-5), merge_subjects=False, keys=MEAN),
        MEMITMerge(metric=Covariance(weight=1e-5)),
    ):
        editor = replace(editor, layers=(1,), target=target_of(BARE))
        made = editor.compute(tiny_llama, TWINS, statistics, progress=False)
        ((_, K, R, _),) = inputs(tiny_llama, editor, TWINS, made, (1,))
        wanted[editor.name] = R
        shift = made.delta(1).double() @ K
        torch.testing.assert_close(
            shift, R.mean(1, keepdim=True).expand_as(R), rtol=1e-3, atol=1e-3
        )
    assert wanted["MEMIT"].shape[1] == 2 and wanted["MEMIT-Merge"].shape[1] == 1
    with pytest.raises(EditError, match="MEMIT\\(merge_subjects=False\\)"):
        MEMITMerge(merge_subjects=False)


def test_emmet_refuses_dependent_keys_and_says_what_helps(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    editor = EMMET(layers=(1,), target=target_of(BARE), merge_subjects=False)
    with pytest.raises(
        EditError, match="keys are dependent.*cosine 1.0.*merge_subjects=True, or metric.ridge"
    ):
        editor.compute(tiny_llama, TWINS, statistics, progress=False)
    assert (
        replace(editor, metric=Exact(ridge=0.1))
        .compute(tiny_llama, TWINS, statistics, progress=False)
        .report.layers["1"]["gain"]
        < 1
    )
    merged = replace(editor, merge_subjects=True).compute(
        tiny_llama, TWINS, statistics, progress=False
    )
    assert merged.report.layers["1"]["gain"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(EditError, match="ridge must not be negative"):
        EMMET(metric=Exact(ridge=-1))


class TestFaultsOfThePublishedCodes:
    def test_rome_divides_by_the_mean_key_not_by_the_bare_prompts(self, tiny_llama):
        """kmeng01/rome pull request 44: (C^-1 k) / (k_bare C^-1 k) overshoots where the bare key
        differs.
        """
        statistics = statistics_of(tiny_llama, [1])
        editor = ROME(layers=(1,), target=target_of(VALUES))
        made = editor.compute(tiny_llama, FACTS[:1], statistics, progress=False)
        ((_, K, R, _),) = inputs(tiny_llama, editor, FACTS[:1], made, (1,))
        bare = group_keys(tiny_llama, [FACTS[:1]], 1, 1, ("{}",)).keys.T
        u = torch.linalg.solve(statistics.moment(1), K)
        update = made.delta(1).double()
        assert (update - R @ u.T / (u.T @ K)).norm() <= 1e-6 * update.norm()
        assert (update - R @ u.T / (u.T @ bare)).norm() >= 1e-2 * update.norm()

    @pytest.mark.parametrize(
        "editor", [MEMIT(), AlphaEdit(), EMMET(), ROME()], ids=lambda editor: editor.name
    )
    def test_no_state_leaks_between_cases(self, tiny_llama, editor):
        """AlphaEdit's cache of earlier keys is a module global in the published codes (EasyEdit
        issue 613).
        """
        statistics, history = statistics_of(tiny_llama, [1]), History(tiny_llama.fingerprint)
        editor = replace(editor, layers=(1,), target=target_of(VALUES))
        first = editor.compute(tiny_llama, FACTS[:1], statistics, progress=False)
        other = editor.compute(tiny_llama, FACTS[1:2], statistics, progress=False)
        with other.applied_to(tiny_llama):
            history.add(other)
            later = editor.compute(
                tiny_llama, FACTS[:1], statistics, history=history, progress=False
            )
        assert len(history) == 1 and later.key != first.key
        assert editor.compute(tiny_llama, FACTS[:1], statistics, progress=False).key == first.key

    def test_the_projector_is_found_once_for_all_batches(self, tiny_llama, monkeypatch):
        statistics, seen, eigh = statistics_of(tiny_llama, [1]), [], torch.linalg.eigh
        monkeypatch.setattr(torch.linalg, "eigh", lambda C: seen.append(len(C)) or eigh(C))
        for gain in (0.5, 0.9):
            for fact in FACTS:
                AlphaEdit(
                    layers=(1,), target=target_of(VALUES), metric=NullSpace(gain=gain)
                ).compute(tiny_llama, [fact], statistics, progress=False)
        assert seen == [tiny_llama.d_ff]
        AlphaEdit(layers=(1,), target=target_of(VALUES), metric=NullSpace(relative=0.5)).compute(
            tiny_llama, FACTS, statistics, progress=False
        )
        assert len(seen) == 2

    def test_nothing_drags_a_graph_along(self, tiny_llama):
        statistics = statistics_of(tiny_llama, [1])
        for editor in (MEMIT(), AlphaEdit(), EMMET(), ROME()):
            editor = replace(editor, layers=(1,), target=target_of(VALUES))
            targets = editor.target.values(task_of(tiny_llama, editor, [FACTS[:1]], (1,)))
            tensors = [part for part in vars(targets).values() if part is not None]
            assert not any(part.requires_grad for part in tensors)
            made = editor.compute(tiny_llama, FACTS[:1], statistics, progress=False)
            assert not any(
                t.requires_grad for t in (*pair(tiny_llama, made, 1), *made.keys.values())
            )


def test_alphaedit_names_a_null_space_that_is_not_there(tiny_llama):
    with pytest.raises(StatisticsError, match="null space is empty"):
        AlphaEdit(layers=(1,), target=target_of(VALUES), metric=NullSpace(threshold=1e-9)).compute(
            tiny_llama, FACTS, statistics_of(tiny_llama, [1])
        )
