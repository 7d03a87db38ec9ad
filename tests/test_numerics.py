"""Log-space scalars against closed forms."""

import math

import numpy as np
import pytest
import torch

from amortised.numerics import (
    CallCounter,
    check_counts,
    effective_sample_size,
    log_mean_exp,
    value_and_grad,
)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None, math.nan])
def test_counts_are_integers_large_enough(count):
    check_counts(a=1, b=torch.zeros(3).numel(), c=np.int64(7))
    check_counts(minimum=0, a=0)
    with pytest.raises(ValueError, match=f"^b must be an integer, at least 1; got {count!r}$"):
        check_counts(a=1, b=count)
    with pytest.raises(ValueError, match=r"^a must be an integer, at least 2; got 1$"):
        check_counts(minimum=2, a=1)


def test_log_mean_exp_is_the_log_of_the_mean():
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 8.0]], dtype=torch.float64)
    expected = weights.mean(1).log()
    torch.testing.assert_close(log_mean_exp(weights.log(), dim=1), expected)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_log_mean_exp_does_not_overflow(shift):
    x = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64) + shift
    assert log_mean_exp(x, dim=0).item() == pytest.approx(shift + math.log(2.0), abs=1e-10)


def test_log_mean_exp_keeps_zero_weights_and_shows_nan():
    assert log_mean_exp(torch.full((4,), -torch.inf), dim=0) == -torch.inf
    assert log_mean_exp(torch.tensor([0.0, torch.nan]), dim=0).isnan()
    with pytest.raises(ValueError, match=r"dim=0.*\(0, 3\)"):
        log_mean_exp(torch.zeros(0, 3), dim=0)


def test_effective_sample_size_limits():
    equal = torch.full((7, 2), -300.0)
    torch.testing.assert_close(effective_sample_size(equal), torch.tensor([7.0, 7.0]))
    one = torch.tensor([0.0, -torch.inf, -torch.inf])
    assert effective_sample_size(one) == 1.0
    assert effective_sample_size(torch.full((3,), -torch.inf)) == 0.0


def test_effective_sample_size_is_kish():
    weights = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = weights.sum(0).square() / weights.square().sum(0)
    torch.testing.assert_close(effective_sample_size(weights.log()), expected)
    torch.testing.assert_close(effective_sample_size(weights.log() - 2000.0), expected)


def test_value_and_grad_of_a_quadratic():
    precision = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, grad = value_and_grad(lambda z: -0.5 * ((z @ precision) * z).sum(-1), z)
    torch.testing.assert_close(grad, -z @ precision)
    assert value.shape == (3, 4) and not value.requires_grad and not z.requires_grad


def test_value_and_grad_works_under_no_grad_and_can_keep_the_graph():
    with torch.no_grad():
        _, grad = value_and_grad(lambda z: z.pow(3).sum(-1), torch.tensor([[2.0]]))
    assert grad.item() == 12.0
    z = torch.tensor([[2.0]], requires_grad=True)
    _, grad = value_and_grad(lambda z: z.pow(3).sum(-1), z, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), z)
    assert second.item() == 12.0


def test_value_and_grad_refuses_a_function_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(5, 2\).*returned \(5, 2\)"):
        value_and_grad(lambda z: -z.square(), torch.zeros(5, 2))


def test_call_counter_counts_points():
    counter = CallCounter(lambda z: z.sum(-1))
    value_and_grad(counter, torch.zeros(3, 4, 2))
    counter(torch.zeros(2))
    assert (counter.calls, counter.points) == (2, 13)
