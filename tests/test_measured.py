"""What scripts have measured once for chapters 3 and 4, and how they measure it."""

import json
import math

import gaussian_budget
import pytest
import race_times
import torch

from amortised import data

MEASURED = data.data_folder() / "measured"


def test_a_gradient_of_each_optimiser_has_its_time(monkeypatch):
    monkeypatch.setattr(race_times, "NUM_IMAGES", 3)
    monkeypatch.setattr(race_times, "NUM_STEPS", 2)
    found = race_times.measure(num_rounds=1)
    known = json.loads((MEASURED / "iterative_race.json").read_text())
    assert found.keys() == known["milliseconds_a_gradient"].keys()
    assert min(known["milliseconds_a_gradient"].values()) > 0 and known["images"] == 200


def test_the_gaussian_problem_is_the_published_one():
    delta, sigma, centre, spread = gaussian_budget.problem()
    assert len(sigma) == 1 + 2 + 3 + 5 + 11 + 25 + 51 + 101 + 201 + 301
    assert sigma[:3].tolist() == pytest.approx([1.0, 1.0, 1.0])  # d = 1, and both of d = 2
    assert sigma[3:6].tolist() == pytest.approx([1.0, 0.1, 1.0])
    assert delta[-301:].tolist() == pytest.approx([n / 5 for n in range(-150, 151)])
    excess = (centre - delta)[:, -301:]
    assert excess.std().item() == pytest.approx(1.0, abs=0.05)  # of z, nearly
    assert (spread / sigma**2).mean().item() == pytest.approx(0.9999, abs=1e-3)


def test_the_bound_is_the_mean_over_ten_trajectories():
    _, _, centre, spread = gaussian_budget.problem()
    fit = {name: value.detach() for name, value in gaussian_budget.start(3, True).items()}
    fit |= {"delta": fit["delta"] + 0.3, "log_sigma": fit["log_sigma"] - 1.5}
    torch.manual_seed(1)
    found = gaussian_budget.bound(fit, 3, centre, spread).item()
    torch.manual_seed(1)
    z, rho = torch.randn(2, 10, 10, 701).double()
    rho, step = 5 * rho, 0.005
    variance = torch.tensor(math.exp(3.0)).double()  # log sigma is 1.5

    def force(z):
        return -10_000 / variance * (z + 0.3 - centre) - z

    for before, after in ((5, 5 - 4 / 9), (5 - 4 / 9, 5 - 16 / 9), (5 - 16 / 9, 1)):
        rho = rho + step / 2 * force(z)
        z = z + step * rho
        rho = (rho + step / 2 * force(z)) * after / before
    total = spread + (z + 0.3 - centre) ** 2
    expected = -10_000 * (1.5 + total / (2 * variance)) - z**2 / 2 - rho**2 / 2
    assert found == pytest.approx(expected.mean(0).sum().item(), rel=1e-6)


def test_errors_are_those_of_each_part():
    fit = gaussian_budget.fitted(0, False, num_updates=0)
    found = gaussian_budget.squared_errors(fit["delta"], fit["log_sigma"].exp())
    offsets = sum((n / 5) ** 2 for n in range(-150, 151))
    assert found["delta"][3][-1] == pytest.approx(offsets, rel=1e-4)
    assert found["sigma"][0][0] == pytest.approx((math.exp(3.0) - 1.0) ** 2, rel=1e-4)
