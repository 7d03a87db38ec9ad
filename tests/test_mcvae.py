"""Chains inside the bound: unbiasedness is the test of everything."""

import math

import pytest
import torch

from amortised.hvae import HamiltonianFlow, hvae_path
from amortised.mcmc import LeapfrogState
from amortised.mcvae import (
    Bridge,
    LeapfrogMap,
    Maps,
    PlanarFlow,
    RealNVP,
    annealed_path,
    langevin_path,
    metvae_path,
    uha_path,
)
from amortised.objectives import score_function_surrogate
from paths import (
    LOG_P,
    METHODS,
    Nodes,
    X,
    bound_and_mean,
    by_quadrature,
    cases,
    chosen,
    mean_over_signs,
    method,
    normal,
    scalar_model,
    scored,
    spread,
)

CASES = {case[0]: case[1:] for case in cases()}


def ratio_and_error(log_weights, log_p):
    ratio = (log_weights.detach() - log_p).exp().flatten()
    return ratio.mean().item(), (ratio.std() / math.sqrt(len(ratio))).item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_the_mean_weight_is_the_evidence(name, case):
    model, q, x, log_p = CASES[case]
    if name in ("realnvp", "flow") and x.shape[-1] != 3:
        pytest.skip("a coupling needs two dimensions")
    torch.manual_seed(1)
    function, options = method(name, model.latent_dim)
    with torch.no_grad():
        path = function(model, q, x, 20_000, **options)
    ratio, error = ratio_and_error(path.log_weights, log_p)
    assert abs(ratio - 1) < 3 * error and error < 0.03
    assert path.log_weights.mean() < log_p


def bridge(num_steps, step_size=0.2**0.5, **options):
    return Bridge(1, num_steps, step_size=step_size, **options).double()


@pytest.mark.parametrize(("num_steps", "known"), [(1, -2.462), (5, -2.284), (10, -2.167)])
def test_bounds_of_langevin_steps(num_steps, known):
    settings = bridge(num_steps)
    bound = mean_over_signs(langevin_path, num_steps + 1, settings=settings).item()
    assert bound == pytest.approx(known, abs=0.003)


@pytest.mark.parametrize(("num_steps", "known"), [(1, -2.457), (5, -2.169), (10, -2.025)])
def test_bounds_of_uncorrected_hamiltonian_annealing(num_steps, known):
    settings = bridge(num_steps, 0.447, persistence=0.5)
    bound = mean_over_signs(uha_path, num_steps + 1, settings=settings).item()
    assert bound == pytest.approx(known, abs=0.005 if num_steps == 1 else 0.003)


@pytest.mark.parametrize(("num_steps", "known"), [(1, -2.465), (5, -2.297)])
def test_bounds_of_annealed_importance_sampling(num_steps, known):
    torch.manual_seed(2)
    q = normal([0.0], [1.0])
    with torch.no_grad():
        path = annealed_path(scalar_model(), q, X, 200_000, settings=bridge(num_steps))
    assert path.log_weights.mean().item() == pytest.approx(known, abs=0.008)


@pytest.mark.parametrize(
    ("rule", "mean", "bound", "tolerance"),
    [("barker", 1.0, -2.53976, 1e-4), ("metropolis", 0.7516, -3.194, 5e-3)],
)
def test_metropolis_loses_support_and_barker_does_not(rule, mean, bound, tolerance):
    found = bound_and_mean(*by_quadrature(Maps([LeapfrogMap(1, 0.3).double()], rule), num=1201))
    assert found == pytest.approx((bound, mean), abs=tolerance)


class Still(torch.nn.Module):
    uses_gradient = False

    def forward(self, state, evaluate):
        return state, 0.0


def test_identity_maps_give_the_elbo_and_metropolis_pays_for_its_decisions():
    z0 = torch.tensor([-1.0, 1.0]).double()
    for rule, cost in (("barker", 0.0), ("metropolis", 3 * math.log(2)), ("always", 0.0)):
        with chosen([z0], 3 * [0.0]):
            path = metvae_path(scalar_model(), Nodes(z0), X, 2, settings=Maps([Still()] * 3, rule))
        assert path.log_weights.mean().item() == pytest.approx(-2.5439385 - cost, abs=1e-6)


def test_always_accepted_leapfrog_maps_are_the_untempered_flow():
    flow = HamiltonianFlow(1, 3, "none", step_size=0.3).double()
    maps = Maps([LeapfrogMap(1, 0.3).double()] * 3, "always")
    one = mean_over_signs(hvae_path, 2, flow=flow)
    other = mean_over_signs(metvae_path, 2, settings=maps)
    assert one.item() == pytest.approx(other.item(), abs=1e-6)
    assert mean_over_signs(metvae_path, 2, settings=Maps([])).item() == pytest.approx(
        -2.543939, abs=1e-6
    )


def test_the_skipping_rule_is_caught():
    """A published shortcut: moves of small Metropolis probability get no weight."""
    torch.manual_seed(3)
    num_steps, step = 5, math.sqrt(1.6)
    z = torch.randn(200_000).double()
    log_q, log_p = (lambda z: -0.5 * z**2), (lambda z: -0.5 * z**2 - 0.5 * (1.5 - z) ** 2)
    log_w = -0.5 * math.log(2 * math.pi) - log_q(z)
    for k in range(1, num_steps + 1):
        beta = k / (num_steps + 1)

        def at(z, b=beta):
            return (1 - b) * log_q(z) + b * log_p(z)

        def force(z, b=beta):
            return -z + b * (1.5 - z)

        noise = torch.randn_like(z)
        new = z + 0.5 * step**2 * force(z) + step * noise
        back = (z - new - 0.5 * step**2 * force(new)) / step
        gain = 0.5 * (noise**2 - back**2)
        moved = torch.minimum(torch.zeros_like(z), at(new) - at(z) + gain).exp() > 0.1
        z, log_w = torch.where(moved, new, z), log_w + torch.where(moved, gain, 0.0)
    ratio, error = ratio_and_error(log_w + log_p(z), LOG_P)
    assert ratio == pytest.approx(1.135, abs=0.02) and ratio - 1 > 10 * error

    settings = bridge(num_steps, step, max_step_size=2.0)
    with torch.no_grad():
        path = langevin_path(scalar_model(), normal([0.0], [1.0]), X, 200_000, settings=settings)
    ratio, error = ratio_and_error(path.log_weights, LOG_P)
    assert abs(ratio - 1) < 3 * error


# --- gradients -----------------------------------------------------------------------------------


def differences(bound, parameters, step=1e-5):
    for parameter in parameters:
        flat = parameter.data.view(-1)
        flat[0] += step
        above = bound().item()
        flat[0] -= 2 * step
        yield (above - bound().item()) / (2 * step)
        flat[0] += step


@pytest.mark.parametrize("kind", ["langevin", "uha", "mcd", "hvi"])
def test_pathwise_gradients(kind):
    torch.manual_seed(4)
    model = scalar_model()
    settings = {
        "langevin": lambda: bridge(3),
        "uha": lambda: bridge(3, persistence=0.5),
        "mcd": lambda: scored(1, persistence=0.5).double(),
        "hvi": lambda: scored(1, on_target=True).double(),
    }[kind]()
    parameters = [model.weight, *settings.parameters()]

    def bound():
        return mean_over_signs(uha_path, 4, model=model, settings=settings)

    found = torch.autograd.grad(bound(), parameters)
    expected = list(differences(bound, parameters))
    assert [g.reshape(-1)[0].item() for g in found] == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert sum(abs(value) > 1e-4 for value in expected) >= len(expected) // 2


@pytest.mark.parametrize("function", [metvae_path, annealed_path])
def test_decisions_need_their_own_term(function):
    model, count = scalar_model(), 2 if function is metvae_path else 1
    module = LeapfrogMap(1, 0.9).double() if function is metvae_path else bridge(1, 0.9)
    settings = Maps([module] * count) if function is metvae_path else module
    parameters = [model.weight, module.raw_step_size]

    def exact():
        with torch.no_grad():
            found = by_quadrature(settings, function, count, model)
        return torch.tensor(bound_and_mean(*found)[0], dtype=torch.float64)

    mass, outcomes = by_quadrature(settings, function, count, model)
    chance = [mass * d.detach().exp() * ok for _, d, ok in outcomes]
    pathwise = sum((c * w).sum() for c, (w, _, _) in zip(chance, outcomes, strict=True))
    score = sum((c * w.detach() * d).sum() for c, (w, d, _) in zip(chance, outcomes, strict=True))
    expected = list(differences(exact, parameters, step=1e-4))
    full = torch.autograd.grad(pathwise + score, parameters, retain_graph=True)
    half = torch.autograd.grad(pathwise, parameters)
    assert [g.item() for g in full] == pytest.approx(expected, rel=0.01)
    assert half[1].item() != pytest.approx(expected[1], rel=0.1)


def test_the_last_decision_of_barker_leaves_the_weight_as_it_is():
    """Both outcomes average the target over the two points: there is no score term to add."""
    _, ((accepted, *_), (rejected, *_)) = by_quadrature(Maps([LeapfrogMap(1, 0.9).double()]))
    assert torch.allclose(accepted, rejected, atol=1e-10)


def test_the_surrogate_of_a_path_has_its_mean_and_the_score_term():
    torch.manual_seed(6)
    settings = bridge(2, 0.9)
    path = annealed_path(scalar_model(), normal([0.0], [1.0]), X, 6, settings=settings)
    surrogate = score_function_surrogate(path.log_weights, path.log_decisions)
    assert torch.allclose(surrogate, path.log_weights.mean(0))
    found = torch.autograd.grad(surrogate.sum(), settings.raw_step_size, retain_graph=True)[0]
    w = path.log_weights.detach()
    others = (w.sum(0) - w) / 5
    by_hand = (path.log_weights + (w - others) * path.log_decisions).mean(0).sum()
    assert torch.allclose(found, torch.autograd.grad(by_hand, settings.raw_step_size)[0])


# --- maps, costs, arguments ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: spread(RealNVP(3)), lambda: PlanarFlow(3)])
def test_jacobians_of_maps(make):
    torch.manual_seed(7)
    flow, z = make().double(), torch.tensor([0.5, -1.0, 0.3]).double()
    if isinstance(flow, PlanarFlow):
        flow.u.data, flow.w.data = (
            -2 * torch.ones(3).double(),
            torch.tensor([1.0, 0.5, 2.0]).double(),
        )

    def move(z):
        return flow(LeapfrogState(z, z, None, None), lambda z: (None, None))

    jacobian = torch.autograd.functional.jacobian(lambda z: move(z)[0].z, z)
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert move(z)[1].item() == pytest.approx(log_det.item(), abs=1e-10) and sign > 0
    assert abs(log_det) > 0.01


def test_gradients_of_a_path_are_counted(monkeypatch):
    calls = []
    model = CASES["linear"][0]
    plain = model.log_joint
    monkeypatch.setattr(model, "log_joint", lambda x, z: calls.append(0) or plain(x, z))
    q, x = CASES["linear"][1:3]
    costs = {"uha": 5, "mcd": 4, "langevin": 5, "annealed": 5, "barker": 3, "realnvp": 3, "flow": 1}
    for name, cost in (costs | {"potential": 1, "hvae": 4}).items():
        calls.clear()
        function, options = method(name, 5)
        function(model, q, x, 2, **options)
        assert len(calls) == cost, name


def test_a_trajectory_that_leaves_for_infinity_is_rejected():
    torch.manual_seed(8)
    settings = Bridge(5, 3, step_size=1e30, max_step_size=1e31).double()
    model, q, x, _ = CASES["linear"]
    with torch.no_grad():
        path = annealed_path(model, q, x, 500, settings=settings)
        maps = Maps([LeapfrogMap(5, 1e30, 9, max_step_size=1e31).double()])
        decided = metvae_path(model, q, x, 500, settings=maps)
    assert (path.acceptance == 0).all() and path.log_weights.isfinite().all()
    assert (decided.acceptance == 0).all() and decided.log_weights.isfinite().all()


def test_bad_arguments_are_named():
    q, model = normal([0.0], [1.0]), scalar_model()
    with pytest.raises(ValueError, match="acceptance must be barker, metropolis or always"):
        metvae_path(model, q, X, 1, settings=Maps([], "never"))
    with pytest.raises(ValueError, match=r"no momentum and have no score; got persistence = 0\.5"):
        langevin_path(model, q, X, 1, settings=bridge(2, persistence=0.5))
    with pytest.raises(ValueError, match=r"persistence must lie in \[0, 1\); got 1"):
        bridge(2, persistence=1.0)
    with pytest.raises(ValueError, match="num_samples must be an integer, at least 1; got 0"):
        uha_path(model, q, X, 0, settings=bridge(2))
    with pytest.raises(ValueError, match="latent_dim must be an integer, at least 2; got 1"):
        RealNVP(1)
