"""The graders themselves: they measure what they say, and they refuse what they must (unit)."""

import pytest
import torch

from knowedit_kernels import numerics, testing


def test_grade_measures_the_three_errors():
    reference = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    result = reference.clone()
    result[0, 0] += 4e-3
    graded = testing.grade_moment(result, reference)
    assert graded.elementwise == pytest.approx(1e-3)
    assert graded.bias == pytest.approx(5e-4)
    assert graded.normwise == pytest.approx(4e-3 / 17**0.5)
    with pytest.raises(AssertionError, match="toy misses its budget: normwise"):
        graded.check(numerics.MOMENT, "toy")


def test_nan_and_a_zero_scale_fail():
    reference = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert not testing.grade_moment(reference, reference).failures(numerics.MOMENT_FP64)
    assert testing.grade_moment(reference * float("nan"), reference).failures(numerics.MOMENT)
    assert testing.grade_moment(reference + torch.full((2, 2), 1e-30).double(), reference).failures(
        numerics.MOMENT
    )


def test_shape_mismatch_is_an_error():
    with pytest.raises(ValueError, match="shape"):
        testing.grade(torch.zeros(2), torch.zeros(3))


def test_guarded_sees_writes_outside():
    guard = testing.guarded(torch.arange(12.0).reshape(2, 2, 3), margin=8, row_margin=2)
    assert torch.equal(guard.tensor, torch.arange(12.0).reshape(2, 2, 3))
    guard.tensor.zero_()
    guard.check()
    guard.buffer[8 + 3] = 0.0  # the gap after the first row
    with pytest.raises(AssertionError, match="1 elements"):
        guard.check()


def test_poison():
    assert testing.poisoned_empty(3).isnan().all()
    assert (testing.poisoned_empty(3, dtype=torch.int32) == 2**31 - 1).all()
    with testing.poisoned_allocations():
        assert torch.empty(2, 2).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert not torch.zeros(2).isnan().any()


def test_truncation_model_matches_the_emulation():
    assert numerics.truncation_bias(1024) == pytest.approx(-1.4e-6, rel=0.05)
    assert numerics.truncation_bias(8192) == pytest.approx(-1.1e-5, rel=0.05)
