"""Second moments of routed experts against plain sums over all tokens; rare experts; what is
told of them (unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.errors import StatisticsError
from knowedit.models.editable import EditableModel
from knowedit.statistics import key_statistics
from knowedit.statistics.convergence import _compare
from knowedit.statistics.experts import filled, moment_of, rare
from knowedit.statistics.files import npz
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics
from knowedit.statistics.keys import KeyStatistics
from knowedit.statistics.moments import second_moments
from tests.knowedit.models.tiny import build

LAYERS = (1, 2)
TEXTS = ["The old king of Rome lived in a city by the river", "People over snow like music"] * 4


@pytest.fixture
def mixture(byte_tokenizer):
    return EditableModel(build("deepseek_v3"), byte_tokenizer, name="deepseek")


def by_hand(model, lists, layer):
    """sum(k kᵀ) of the wide keys and tokens a expert, from the plain model, in float64."""
    experts, module = model.layout.experts(layer), model.projection(layer).module
    total = torch.zeros(experts.count, experts.width, experts.width, dtype=torch.float64)
    counts = torch.zeros(experts.count, dtype=torch.long)
    seen = []
    handle = module.register_forward_hook(lambda _, given, out: seen.append(given))
    for ids in lists:
        model.hf(input_ids=torch.tensor([ids]))
    handle.remove()
    for states, index, gates in seen:
        for state, chosen, weight in zip(states.double(), index, gates.double()):
            for expert, gate in zip(chosen.tolist(), weight):
                gate_proj, up = (module.gate_up_proj[expert].double() @ state).chunk(2)
                key = gate * torch.nn.functional.silu(gate_proj) * up
                total[expert] += torch.outer(key, key)
                counts[expert] += 1
    return total, counts


def test_sums_are_those_of_plain_transformers(mixture):
    lists = [mixture.row(text).ids for text in TEXTS]
    found = second_moments(mixture, LAYERS, lists)  # a dense layer and one with experts
    wanted, counts = by_hand(mixture, lists, 2)
    assert found[1].count == found[2].count == sum(map(len, lists))
    assert torch.equal(found[2].counts, counts) and found[2].audit().ok()
    torch.testing.assert_close(found[2].sum(), wanted, rtol=1e-5, atol=1e-5 * wanted.max())


def test_statistics_are_collected_written_and_read(mixture, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{t} {n}" for n in range(12) for t in TEXTS), encoding="utf-8")
    found = key_statistics(
        mixture, LAYERS, text, 3000, directory=tmp_path / "s", max_length=64, progress=False
    )
    layer = found[2]
    assert len(layer.counts) == 4 and sum(layer.counts) == 2 * 3000 and layer.count == 3000
    assert found.moment(1).shape == (48, 48) and found.moment(2).shape == (4, 24, 24)
    read = KeyStatistics.load(tmp_path / "s")
    assert read.identity == found.identity and torch.equal(read.moment(2), found.moment(2))
    wide = torch.block_diag(*found.moment(2))
    X = torch.randn(96, 3, dtype=torch.float64)
    torch.testing.assert_close(found.metric(2).inverse(X), torch.linalg.solve(wide, X))
    space = found.null_space(2)
    inside = torch.block_diag(
        *[
            vectors[:, values < values.mean()] @ vectors[:, values < values.mean()].T
            for values, vectors in map(torch.linalg.eigh, found.moment(2))
        ]
    )
    torch.testing.assert_close(space.inverse(X), inside @ X)
    with pytest.raises(StatisticsError, match="statistics of 4 experts, and a peer's file"):
        npz.write(tmp_path, layer, "rome")
    with pytest.raises(StatisticsError, match="5 tokens are too few"):
        KeyStatistics({2: replace(layer, counts=(2, 1, 2, 0))}).metric(2)


def test_rare_experts_are_filled_up_with_the_mean_of_all(tmp_path):
    generator = torch.Generator().manual_seed(0)
    counts, d, tokens = torch.tensor([90, 3, 0, 20]), 5, 60
    rows = [torch.randn(int(n), d, generator=generator, dtype=torch.float64) for n in counts]
    totals = torch.stack([k.T @ k for k in rows])
    found = filled(totals, counts, tokens)
    assert rare(counts, d) == [1, 2]
    for expert in (0, 3):  # enough of their own: theirs alone
        torch.testing.assert_close(found[expert], totals[expert] / tokens)
    mean = totals.sum(0) / counts.sum()
    torch.testing.assert_close(found[2], 10 * mean / tokens)  # as of 2 d tokens like the others'
    torch.testing.assert_close(found[1], (totals[1] + 7 * mean) / tokens)
    file = tmp_path / "layer-000.safetensors"
    recipe = CollectionRecipe("f", {"name": "t"}, tokens, 64, True, 0)
    made = LayerStatistics(
        0, "m", "n", recipe, tokens, totals, 1.0, 1.0, {}, tuple(counts.tolist())
    )
    made.save(file)
    read = LayerStatistics.load(file)
    assert read.digest == made.digest and read.counts == made.counts
    assert KeyStatistics({0: read}).rare_experts(0) == [1, 2]


def test_the_worst_expert_that_keys_reach_decides(mixture):
    experts = replace(mixture.layout.experts(2), count=3, width=6)
    generator = torch.Generator().manual_seed(0)

    def half(sizes):
        rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in sizes]
        return torch.stack([k.T @ k for k in rows])

    sums = [half((4000, 40, 10)) for _ in range(2)]
    keys = torch.zeros(8, 18, dtype=torch.float64)
    keys[:4, :6] = torch.randn(4, 6, generator=generator)
    often = _compare(experts, sums, [5000, 5000], keys, False)["solve"].median
    keys[4:, 6:12] = torch.randn(4, 6, generator=generator)
    seldom = _compare(experts, sums, [5000, 5000], keys, False)["solve"].median
    assert 0 < often < 0.05 < seldom


def test_moments_of_keys_are_blocks(mixture):
    experts = mixture.layout.experts(2)
    keys = torch.randn(7, 96, dtype=torch.float64)
    whole = keys.T @ keys / 7
    blocks = [whole[i : i + 24, i : i + 24] for i in range(0, 96, 24)]
    torch.testing.assert_close(moment_of(keys, experts), torch.stack(blocks))
    torch.testing.assert_close(moment_of(keys, None), whole)
