"""Deliberately wrong second moments: every gate must reject them, and the emulated right one must
pass (unit).

On a tensor core that truncates, the single chain is biased and the self-centred scheme is not; no
GPU is needed to see it.
"""

import itertools

import pytest
import torch

from knowedit_kernels import numerics, testing
from knowedit_kernels.moments import audit, schedule
from knowedit_kernels.moments.functional import mirror_
from knowedit_kernels.moments.reference import second_moment, two_parts
from tests.kernels.moment_data import keys as make_keys
from tests.negative.tensor_core import chain, lengths, plain, self_centred, truncate

TOKENS, DIM = 16384, 48


@pytest.fixture(scope="module")
def keys():
    return make_keys(TOKENS, DIM, torch.bfloat16)


@pytest.fixture(scope="module")
def reference(keys):
    return second_moment(keys)


def rejected(result, reference):
    """The measures that fail."""
    return {
        line.split()[0]
        for line in testing.grade_moment(result, reference).failures(numerics.MOMENT)
    }


def test_truncate_is_towards_zero_and_to_24_bits():
    x = torch.tensor(
        [1 + 2**-24, 1 + 2**-23 + 2**-25, -(1 + 3 * 2**-25), 0.0, 2.0**60], dtype=torch.float64
    )
    assert truncate(x).tolist() == [1.0, 1 + 2**-23, -1.0, 0.0, 2.0**60]


def test_emulated_self_centred_scheme_is_within_budget(keys, reference):
    cap = schedule.config(torch.bfloat16, "exact", 90, TOKENS).chain
    testing.grade_moment(self_centred(keys, cap), reference).check(numerics.MOMENT)


def test_emulated_short_launches_are_within_budget(keys):
    few = keys[: schedule.FEW_TOKENS]
    cap = schedule.config(torch.bfloat16, "exact", 90, len(few)).chain
    testing.grade_moment(self_centred(few, cap), second_moment(few)).check(numerics.MOMENT)


def test_drifting_energy_keeps_the_bias_small():
    drift = 1 + 0.5 * torch.sin(torch.linspace(0, 2, TOKENS))
    keys = (make_keys(TOKENS, DIM) * drift[:, None]).bfloat16()
    centred = testing.grade_moment(self_centred(keys, 512), second_moment(keys))
    straight = testing.grade_moment(plain(keys, 512), second_moment(keys))
    assert abs(centred.bias) <= 2e-7 and abs(straight.bias) >= 5e-7


@pytest.mark.parametrize("length", [1024, 8192, TOKENS])
def test_single_chains_are_rejected_with_the_predicted_bias(keys, reference, length):
    result = plain(keys, length)
    assert rejected(result, reference) >= {"normwise", "elementwise", "bias"}
    assert testing.grade_moment(result, reference).bias == pytest.approx(
        numerics.truncation_bias(length), rel=0.1
    )


def test_uncentred_chains_of_the_same_length_are_rejected(keys, reference):
    assert "bias" in rejected(plain(keys, 512), reference)


def test_bf16_output_is_rejected(keys, reference):
    assert "elementwise" in rejected(reference.bfloat16(), reference)
    assert "normwise" in rejected(reference.bfloat16(), reference)


def test_three_products_are_rejected_and_four_are_a_gram_matrix():
    # a strong common direction and tiny variation around it: the hard case for small eigenvalues
    keys = 1 + 1e-3 * make_keys(TOKENS, DIM)
    expected = second_moment(keys)
    both = two_parts(keys)
    low = both - keys.bfloat16().double()
    four = second_moment(both)
    testing.grade_moment(four, expected).check(numerics.MOMENT)
    three = four - low.T @ low
    assert "bias" in rejected(three, expected)
    smallest = torch.linalg.eigvalsh(expected)[0]
    assert (torch.linalg.eigvalsh(four)[0] / smallest - 1).abs() < 1e-2
    assert (torch.linalg.eigvalsh(three)[0] / smallest - 1).abs() > 0.1


def test_off_by_one_triangles_are_rejected(keys, reference):
    tile = 16
    for missing in (lambda i, j: i == j + 1, lambda i, j: i == j, lambda i, j: (i, j) == (2, 0)):
        c = torch.zeros(DIM, DIM, dtype=torch.float64)
        for i, j in itertools.product(range(DIM // tile), repeat=2):
            if j <= i and not missing(i, j):
                here = slice(i * tile, (i + 1) * tile), slice(j * tile, (j + 1) * tile)
                c[here] = reference[here]
        assert rejected(mirror_(c), reference)


def test_the_audit_alone_catches_what_needs_no_reference(keys, reference):
    signs = audit.signs(DIM)
    wide = keys.double()
    sums = torch.cat([wide.square().sum()[None], (wide @ signs.T).square().sum(0)])
    assert audit.compare(reference, sums, TOKENS).ok(numerics.MOMENT_FP64)
    assert not audit.compare(plain(keys, TOKENS), sums, TOKENS).ok()
    assert not audit.compare(reference.bfloat16().double(), sums, TOKENS).ok()
    mirrored = mirror_(reference.clone().index_fill_(0, torch.tensor([5]), 0.0))
    assert not audit.compare(mirrored, sums, TOKENS).ok()


@pytest.mark.parametrize("dim", [1, 128, 129, 1536, 4096])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_tile_table_covers_the_lower_triangle_once(dim, layers):
    table = [tuple(row) for row in schedule.tile_table(dim, layers, 128)[:, :3].tolist()]
    count = -(-dim // 128)
    expected = {
        (layer, i, j) for layer in range(layers) for i in range(count) for j in range(i + 1)
    }
    assert len(table) == len(set(table)) and set(table) == expected


@pytest.mark.parametrize("tokens", [1, 64, 65, 300, 512, 4096, 5000])
def test_chain_lengths_grow_and_cover_every_token(tokens):
    plan = lengths(tokens, 512, 64)
    assert (sum(plan) == tokens and plan[:2] == [64, 64][: len(plan)]) or tokens < 128
    assert max(plan) <= 512 and sum(plan) == tokens


def test_chain_starts_where_it_is_told(keys):
    start = torch.full((DIM, DIM), 7.0, dtype=torch.float64)
    assert torch.equal(chain(keys[:0], start), start)
    difference = chain(keys[:16], start) - start - keys[:16].double().T @ keys[:16].double()
    assert difference.abs().max() < 1e-4


def test_token_splits_fill_the_device_but_keep_ranges_long():
    assert schedule.splits(78, 16384, 132) == 1
    assert schedule.splits(15, 16384, 132) == 8
    assert schedule.splits(15, 4096, 132) == 2
    assert schedule.splits(1, 100, 132) == 1
