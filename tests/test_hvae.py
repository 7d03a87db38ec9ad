"""Hamiltonian importance sampling: closed forms, invariants, gradients through the dynamics."""

import math
import weakref

import pytest
import torch
from torch import nn

from amortised import targets
from amortised.hvae import HamiltonianFlow, hvae_log_weights, hvae_path, tempering_schedule
from amortised.numerics import CallCounter
from paths import LOG_P, X, mean_over_signs, normal, scalar_model

KNOWN = [  # steps, tempering, first inverse temperature, bound on the scalar model
    (0, "none", None, -2.543939),
    (1, "none", None, -2.535902),
    (3, "none", None, -2.500965),
    (3, "paper", 0.5, -2.309224),
    (3, "mnist_code", 0.5, -2.306644),
    (5, "paper", 0.5, -2.256914),
    (5, "mnist_code", 0.5, -2.260921),
    (3, "free", 0.9**6, -2.336801),
]


def flow_of(num_steps, tempering, beta0, dim=1, **options):
    flow = HamiltonianFlow(dim, num_steps, tempering, step_size=0.3, beta0=beta0, **options)
    return flow.double()


@pytest.mark.parametrize(("num_steps", "tempering", "beta0", "known"), KNOWN)
def test_bounds_of_the_scalar_model(num_steps, tempering, beta0, known):
    flow = flow_of(num_steps, tempering, beta0)
    assert mean_over_signs(hvae_path, 2, flow=flow).item() == pytest.approx(known, abs=2e-6)


def test_more_steps_can_be_worse_than_none():
    long = mean_over_signs(hvae_path, 2, flow=flow_of(10, "paper", 0.1)).item()
    assert long == pytest.approx(-2.760735, abs=2e-6) and long < KNOWN[0][3]


@pytest.mark.parametrize("rule", ["paper", "mnist_code"])
def test_schedules_follow_their_rules(rule):
    betas = tempering_schedule(4, 0.04, rule).double()
    power = {"paper": 0.5, "mnist_code": 1.0}[rule]
    first = 0.04**-power
    expected = [(first + (1 - first) * k * k / 16) ** (-1 / power) for k in range(5)]
    assert betas.tolist() == pytest.approx(expected, rel=1e-5)
    flow = HamiltonianFlow(2, 4, rule)
    beta0 = {"paper": 0.04, "mnist_code": 2 / 3}[rule]
    assert flow.alphas().prod().square().item() == pytest.approx(beta0, rel=1e-5)


def banana(z):
    return -0.5 * (z[..., 0] - 0.4).square() - 2 * (z[..., 1] - z[..., 0].square()).square()


@pytest.mark.parametrize("tempering", ["none", "free", "paper"])
def test_jacobian_is_that_of_the_tempering(tempering):
    flow = flow_of(4, tempering, None, dim=2, varied=True)
    start = torch.tensor([0.3, -0.5, 1.0, 0.7]).double()

    def run(start):
        end = flow(start[:2], start[2:], banana, create_graph=True)
        return torch.cat([end.z, end.momentum])

    jacobian = torch.autograd.functional.jacobian(run, start)
    beta0 = flow.alphas().prod().square()
    assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(beta0.log().item(), abs=1e-10)


def test_untempered_flow_is_reversible_and_nearly_keeps_the_energy():
    flow = flow_of(7, "none", None, dim=2)
    z, momentum = torch.tensor([[0.3, -0.5]]).double(), torch.tensor([[1.0, 0.7]]).double()
    end = flow(z, momentum, banana)
    back = flow(end.z, -end.momentum, banana)
    assert torch.allclose(back.z, z, atol=1e-10) and torch.allclose(-back.momentum, momentum)

    harmonic = flow_of(9, "none", None)
    z, momentum = torch.tensor([[1.3]]).double(), torch.tensor([[-0.4]]).double()
    end = harmonic(z, momentum, lambda z: -0.5 * z.square().sum(-1))
    kept = [(r.square() + (1 - 0.09 / 4) * q.square()).item() for q, r in ((z, momentum), end[:2])]
    assert kept[0] == pytest.approx(kept[1], abs=1e-7)  # 0.3 is a sigmoid of a float32

    def drift(num_steps, step_size):
        flow = HamiltonianFlow(2, num_steps, "none", step_size=step_size).double()
        z = torch.tensor([[0.3, -0.5]]).double()
        end = flow(z, -z, banana)
        return (banana(end.z) - banana(z) - 0.5 * (end.momentum**2 - z**2).sum()).abs().item()

    assert drift(8, 0.05) / drift(16, 0.025) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("num_steps", [0, 1, 10])
def test_k_steps_cost_k_plus_one_gradients(num_steps):
    counter = CallCounter(banana)
    flow_of(num_steps, "free", None, dim=2)(torch.zeros(5, 2).double(), torch.ones(5, 2), counter)
    assert counter.calls == num_steps + 1 and counter.points == 5 * (num_steps + 1)


def numeric(bound, parameter, index=0, step=1e-5):
    """A central difference in one entry of a parameter."""
    flat, values = parameter.data.view(-1), []
    for sign in (1, -1):
        flat[index] += sign * step
        values.append(bound().item())
        flat[index] -= sign * step
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("tempering", ["free", "paper", "mnist_code"])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"create_graph": False}])
def test_gradients_go_through_the_dynamics(tempering, options):
    model, flow = scalar_model(), flow_of(3, tempering, 0.5)

    def bound():
        return mean_over_signs(hvae_path, 2, model=model, flow=flow, **options)

    bound().backward()
    for parameter in (flow.raw_step_size, flow.raw_tempering, model.weight, model.log_noise_scale):
        expected = numeric(bound, parameter)
        is_right = parameter.grad.view(-1)[0].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        assert is_right == (options.get("create_graph") is not False), parameter.grad


class Wiggle(nn.Module):
    """A density with a parameter that is not symmetric, and one that plays no part."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.4, -0.2]).double())
        self.bystander = nn.Parameter(torch.ones(1).double())

    def forward(self, z):
        return banana(z) + (z * self.shift).sin().sum(-1)


@pytest.mark.parametrize("tempering", ["none", "free", "paper"])
@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_a_trajectory_that_is_reversed_has_the_gradient_of_one_that_is_kept(tempering, num_steps):
    torch.manual_seed(3)
    density, options = Wiggle(), {"step_size": 0.1, "varied": num_steps > 1}
    flow = HamiltonianFlow(2, num_steps, tempering, **options).double()
    start = [t.requires_grad_() for t in torch.randn(2, 5, 4, 2).double()]
    wanted = [*start, *flow.parameters(), *density.parameters()]
    found = []
    for options in ({}, {"reverse_for": density.parameters()}):
        end = flow(*start, density, **options)
        value = end.logdensity.sum() + (end.z[..., 0] * end.momentum[..., 1].cos()).sum()
        grads = torch.autograd.grad(value, wanted, materialize_grads=True)
        found.append([value, *grads])
    for kept, reversed_ in zip(*found, strict=True):
        assert torch.allclose(kept, reversed_, rtol=1e-8, atol=1e-9)
    assert found[1][-2].abs().min() > 0 and not found[1][-1].any()


def test_the_memory_of_a_reversed_trajectory_does_not_grow():
    def kept(num_steps, **options):
        held = weakref.WeakSet()  # what is kept, without what was kept for a while

        def pack(tensor):
            box = lambda: tensor  # noqa: E731
            held.add(box)
            return box

        flow, density = flow_of(num_steps, "free", None, dim=2), Wiggle()
        model = targets.Density(density, 2, 0.0)
        q = normal([0.3, 0.1], [1.0, 0.5])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box()):
            path = hvae_path(model, q, X, 500, flow=flow, **options)
        assert path.log_weights.requires_grad
        return sum(box().numel() for box in held)

    grown = [kept(40, **options) - kept(4, **options) for options in ({}, {"reverse": True})]
    assert grown[0] > 36 * 500 * 10 and grown[1] < 36 * 20  # factors and step sizes


def test_dropping_the_momentum_adds_noise_and_leaves_the_gradient():
    torch.manual_seed(0)
    flow, model, sample = (
        flow_of(3, "paper", 0.5),
        scalar_model(),
        torch.randn(2, 100_000, 1, 1).double(),
    )
    z0, noise = sample
    end = flow(z0, noise / flow.alphas().prod(), lambda z: model.log_joint(X, z))
    rao = (end.logdensity - 0.5 * end.momentum.square().sum(-1) + 0.5) + 0.5 * (
        z0.square().sum(-1) + math.log(2 * math.pi)
    )
    full = rao + 0.5 * noise.square().sum(-1) - 0.5
    assert full.std().item() == pytest.approx(1.16, abs=0.01)
    assert rao.std().item() == pytest.approx(1.63, abs=0.01)
    parameters = [flow.raw_step_size, flow.raw_tempering, model.weight]
    for one, other in zip(
        *(torch.autograd.grad(w[7], parameters, retain_graph=True) for w in (full, rao)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="tempering must be one of none, free, paper"):
        HamiltonianFlow(2, 3, "hot")
    with pytest.raises(ValueError, match=r"step_size must lie in \(0, 0.5\); got 0.7"):
        HamiltonianFlow(2, 3, step_size=0.7)
    with pytest.raises(ValueError, match="beta0 must lie in"):
        HamiltonianFlow(2, 3, beta0=1.5)
    with pytest.raises(ValueError, match="rule must be one of paper, mnist_code"):
        tempering_schedule(3, 0.5, "free")
    with pytest.raises(ValueError, match="one distribution per observation"):
        hvae_log_weights(
            scalar_model(), normal([0.0], [1.0]), X.expand(3, 1), 2, flow=flow_of(0, "none", None)
        )
    assert LOG_P == pytest.approx(-1.828012, abs=1e-6)
