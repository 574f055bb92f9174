"""Groups of few rows on an emulated tensor core: our chains keep the budget, wrong ones do not
(unit).
"""

import pytest
import torch

from knowedit_kernels import numerics, testing
from knowedit_kernels.moments import schedule
from knowedit_kernels.moments.functional import mirror_
from knowedit_kernels.moments.reference import grouped_moment
from tests.kernels.moment_data import keys as make_keys
from tests.negative.tensor_core import plain, scaled_parts, self_centred

DIM = 96
SIZES = [schedule.FEW_ROWS, 1000, schedule.FEW_TOKENS - 1, schedule.FEW_TOKENS]


def case(rows):
    keys = make_keys(rows, DIM, torch.bfloat16)
    return keys, torch.rand(rows, generator=torch.Generator().manual_seed(0))


def exact(keys, weights=None):
    return grouped_moment(keys, torch.tensor([0, len(keys)]), weights)[0]


def emulated(keys, weights=None, **changes):
    """Our configuration, with some of its lengths changed."""
    config = schedule.grouped_config(
        torch.bfloat16, "exact", 90, len(keys), weighted=weights is not None
    )
    lengths = {"cap": config.chain, "first": config.first, **changes}
    left = () if weights is None else scaled_parts(keys, weights)
    return mirror_(self_centred(keys, **lengths, left=left))


def failures(result, reference):
    return testing.grade_moment(result, reference).failures(numerics.MOMENT)


@pytest.mark.parametrize("rows", SIZES)
def test_our_chains_keep_the_budget(rows):
    keys, weights = case(rows)
    assert not failures(emulated(keys), exact(keys))
    assert not failures(emulated(keys, weights), exact(keys, weights))


def test_the_dense_kernels_chains_are_too_long_for_few_rows():
    keys, weights = case(2 * schedule.FEW_ROWS)
    assert failures(emulated(keys, cap=256, first=64), exact(keys))
    assert failures(emulated(keys, weights, cap=128), exact(keys, weights))


def test_uncentred_chains_are_rejected():
    keys, _ = case(schedule.FEW_TOKENS)
    assert failures(plain(keys, 128), exact(keys))


def test_weights_that_are_rounded_or_applied_once_are_rejected():
    keys, weights = case(1000)
    reference = exact(keys, weights)
    rounded = (keys.float() * weights[:, None]).bfloat16()
    assert failures(exact(rounded), reference)
    assert failures(exact(keys, weights.sqrt()), reference)
    high = scaled_parts(keys, weights)[2].double()
    assert failures(mirror_((high.T @ keys.double()).contiguous()), reference)


def test_a_row_of_the_neighbour_is_noticed():
    keys, weights = case(1000)
    sums = grouped_moment(keys, torch.tensor([0, 500, 1000]), weights)
    moved = grouped_moment(keys, torch.tensor([0, 501, 1000]), weights)
    assert all(failures(wrong, right) for wrong, right in zip(moved, sums))


def test_groups_are_cut_where_one_would_keep_a_processor_too_long():
    even = [4096] * 128
    assert schedule.cut_rows(even, 21, 132) == [1] * 128
    assert schedule.cut_rows([200_000, 10, 3000], 21, 132) == [7, 1, 1]
    assert schedule.cut_rows([5000], 1, 132) == [3]  # no piece shorter than 2048 without need


def test_small_and_float32_groups_run_in_float64():
    def of(dtype, rows, precision="exact"):
        return schedule.grouped_config(dtype, precision, 90, rows, False)

    assert of(torch.bfloat16, schedule.FEW_ROWS - 1) is None
    assert of(torch.float32, schedule.FEW_TOKENS - 1) is None
    assert of(torch.float64, 10**6) is None and of(torch.bfloat16, 10**6, "fp64") is None
    assert of(torch.bfloat16, schedule.MANY_TOKENS).chain == 512
