"""Every route to the log-likelihood gives the numbers of autograd."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from amortised.ais import AnnealedPath, ais, sigmoid_schedule
from amortised.fast import log_likelihood_and_grad
from amortised.mcmc import LeapfrogState, leapfrog_step
from amortised.models import BernoulliDecoder, ConvBernoulli, LinearGaussian
from amortised.numerics import log_mean_exp, value_and_grad
from amortised.results import load_weights


def reference(model, x, z):
    """Autograd through the model as it is."""
    x = x[0] if len(x) == 1 else x  # broadcasts to z of any leading shape
    return value_and_grad(lambda z: model.log_likelihood(x, z), z)


def confident(model):
    """Scale weights as training does: logits of several nats, units that are on or off."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.ConvTranspose2d):
                module.weight.mul_(2.0)
                module.bias.add_(0.1 * torch.randn_like(module.bias))
    return model


def images(model, count):
    return torch.bernoulli(torch.full((count, model.observation_dim), 0.3))


def is_smooth(model, z):
    """Where no ReLU is so close to its kink that rounding decides on which side it is, [...]."""
    margin = torch.full(z.shape[:-1], torch.inf, dtype=torch.float64).flatten()

    def observe(module, inputs, output):
        u = inputs[0].flatten(1)
        torch.minimum(margin, u.abs().amin(1) / u.square().mean().sqrt(), out=margin)

    exact = copy.deepcopy(model).double()
    handles = [
        module.register_forward_hook(observe)
        for module in exact.modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        exact.log_joint(torch.zeros(exact.observation_dim).double(), z.double())
    for handle in handles:
        handle.remove()
    return margin.view(z.shape[:-1]) > 1e-5


def positions(model, *shape):
    """Normal draws where the gradient is smooth."""
    z = torch.randn(shape, dtype=next(model.parameters()).dtype)
    while not (smooth := is_smooth(model, z)).all():
        z = torch.where(smooth.unsqueeze(-1), z, torch.randn_like(z))
    return z


def assert_agrees(fn, model, x, z, tolerance=1e-5):
    value, grad = fn(z)
    expected_value, expected_grad = reference(model, x, z)
    assert value.shape == z.shape[:-1] and grad.shape == z.shape
    assert not value.requires_grad and not grad.requires_grad
    torch.testing.assert_close(value, expected_value, rtol=tolerance, atol=0)
    torch.testing.assert_close(fn.log_likelihood(z), expected_value, rtol=tolerance, atol=0)
    error = grad - expected_grad
    assert error.norm() <= tolerance * expected_grad.norm()
    assert (error.norm(dim=-1) <= 10 * tolerance * expected_grad.norm(dim=-1)).all()


# --- equal to autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ConvBernoulli, lambda: confident(ConvBernoulli())])
@pytest.mark.parametrize("route", ["eager", "rewritten", "dense"])
def test_routes_agree_with_autograd_for_all_shapes_and_chunks(make, route):
    model = make()
    for shape, num_images, chunk_size in [
        ((7, 6, 32), 6, 16),  # a last chunk that is smaller, chunks that cut across images
        ((6, 32), 6, None),
        ((2, 3, 4, 32), 4, 5),
        ((9, 1, 32), 1, 4),
        ((11, 32), 1, 1),
        ((32,), 1, None),
    ]:
        x = images(model, num_images)
        fn = log_likelihood_and_grad(model, x, route, chunk_size=chunk_size)
        assert fn.route == route
        assert_agrees(fn, model, x, positions(model, *shape))


def deconvolve(*args, shape=(4, 5, 3), latent_dim=3, width=7, **kwargs):
    """A decoder with one hidden image of the given shape."""
    return lambda: nn.Sequential(
        nn.Linear(latent_dim, width),
        nn.ReLU(),
        nn.Linear(width, math.prod(shape)),
        nn.ReLU(),
        nn.Unflatten(1, shape),
        nn.ConvTranspose2d(shape[0], *args, **kwargs),
        nn.Flatten(),
    )


def shared_relu():
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, 8), relu, nn.Linear(8, 8, bias=False), relu),
        nn.Linear(8, 6),
        relu,
    )


ARCHITECTURES = {
    "linear": lambda: nn.Linear(3, 6),
    "multilayer, shared ReLU, no bias, ReLU last": shared_relu,
    "kernel 3, stride 2": deconvolve(1, 3, stride=2, padding=1, output_padding=1),
    "kernel 3, stride 2, no padding": deconvolve(2, 3, stride=2),
    "kernel 4, stride 2, three channels": deconvolve(3, 4, stride=2, padding=1),
    "kernel 2, stride 2, no overlap": deconvolve(1, 2, stride=2, bias=False),
    "kernel 5, stride 3": deconvolve(1, 5, stride=3, padding=1, output_padding=2),
    "kernel 3, stride 1": deconvolve(5, 3, padding=1),
    "kernel 1, stride 1, padding 1": deconvolve(2, 1, padding=1),
    "kernel 1, stride 3, gaps": deconvolve(1, 1, stride=3),
    "kernel 7, stride 2": deconvolve(1, 7, stride=2, padding=3, output_padding=1),
    "even sides": deconvolve(1, 5, stride=2, padding=2, output_padding=1, shape=(2, 4, 6)),
    "three deep, no ReLU between two": lambda: nn.Sequential(
        nn.Linear(3, 16),
        nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.Flatten(),
    ),
    "latent as an image": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1, 1)), nn.ConvTranspose2d(3, 2, 4), nn.Flatten()
    ),
    "linear after an image": lambda: nn.Sequential(
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(3, 2, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(50, 9),
    ),
}
DENSE_ONLY = {
    "an image reshaped": lambda: nn.Sequential(
        nn.Linear(3, 8),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 2, 1),
        nn.Flatten(),
        nn.Unflatten(1, (4, 1, 2)),
        nn.ConvTranspose2d(4, 1, 3),
        nn.Flatten(),
    ),
    "groups": deconvolve(2, 3, stride=2, groups=2),
    "dilation": deconvolve(1, 3, dilation=2, padding=1),
    "oblong kernel": deconvolve(1, (3, 5), stride=(2, 1), padding=(0, 2)),
}


def model_of(decoder):
    return BernoulliDecoder(decoder, 3, decoder(torch.zeros(1, 3)).shape[1]).double()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("route", ["rewritten", "dense"])
def test_routes_agree_with_autograd_for_all_architectures(name, route):
    # In double precision a wrong tap or a shifted pixel cannot hide behind rounding.
    model = model_of(ARCHITECTURES[name]())
    x = images(model, 4).double()
    fn = log_likelihood_and_grad(model, x, route, chunk_size=9)
    assert_agrees(fn, model, x, positions(model, 5, 4, 3), tolerance=1e-13)


@pytest.mark.parametrize("name", DENSE_ONLY)
def test_dense_covers_what_rewritten_refuses(name):
    model = model_of(DENSE_ONLY[name]())
    x, z = images(model, 2).double(), positions(model, 5, 2, 3)
    assert_agrees(log_likelihood_and_grad(model, x, "dense"), model, x, z, tolerance=1e-13)
    with pytest.raises(ValueError, match="this route needs"):
        log_likelihood_and_grad(model, x, "rewritten")
    automatic = log_likelihood_and_grad(model, x)
    assert automatic.route == "eager"
    assert_agrees(automatic, model, x, z, tolerance=1e-13)


def test_chunk_size_changes_no_number_beyond_rounding():
    model = ConvBernoulli()
    x, z = images(model, 3), positions(model, 20, 3, 32)
    value, grad = log_likelihood_and_grad(model, x, chunk_size=1000)(z)
    for chunk_size in (1, 7, 59, 60):
        value_, grad_ = log_likelihood_and_grad(model, x, chunk_size=chunk_size)(z)
        torch.testing.assert_close(value_, value, rtol=1e-6, atol=0)
        assert (grad_ - grad).norm() <= 1e-5 * grad.norm()


def test_extreme_logits_are_exact_and_divergence_is_nan_on_all_routes():
    model = BernoulliDecoder(nn.Linear(1, 2, bias=False), 1, 2)
    nn.init.constant_(model.decoder.weight, 1.0)
    x = torch.tensor([[0.0, 1.0]])
    for route in ("eager", "rewritten", "dense"):
        fn = log_likelihood_and_grad(model, x, route)
        value, grad = fn(torch.tensor([[200.0], [-200.0], [0.0], [torch.nan], [torch.inf]]))
        assert value[:3].tolist() == pytest.approx([-200.0, -200.0, -1.3862944])
        assert grad[:3].flatten().tolist() == [-1.0, 1.0, 0.0]
        assert value[3].isnan() and value[4] == -torch.inf


def test_no_chains_give_empty_results():
    fn = log_likelihood_and_grad(ConvBernoulli(), torch.zeros(2, 784))
    value, grad = fn(torch.empty(0, 2, 32))
    assert value.shape == (0, 2) and grad.shape == (0, 2, 32)


def test_eager_alone_covers_any_model_and_auto_chooses_it():
    model = LinearGaussian(torch.randn(5, 2), torch.randn(5), 0.7)
    x, z = torch.randn(3, 5), torch.randn(4, 3, 2)
    for route in ("eager", "auto"):
        fn = log_likelihood_and_grad(model, x, route, chunk_size=5)
        assert fn.route == "eager"
        assert_agrees(fn, model, x, z)
    with pytest.raises(ValueError, match=r"LinearGaussian is no BernoulliDecoder; only .eager"):
        log_likelihood_and_grad(model, x, "dense")


def test_overridden_likelihood_is_respected():
    class Tempered(ConvBernoulli):
        def log_likelihood(self, x, z):
            return 0.5 * super().log_likelihood(x, z)

    model = Tempered()
    x = images(model, 2)
    fn = log_likelihood_and_grad(model, x)
    assert fn.route == "eager"
    assert_agrees(fn, model, x, positions(model, 3, 2, 32))


def test_callable_works_in_inference_mode_and_out_of_it():
    model = ConvBernoulli()
    x, z = images(model, 2), positions(model, 3, 2, 32)
    with torch.inference_mode():
        fn = log_likelihood_and_grad(model, x)
        inside = fn(z.clone())
    with torch.no_grad():
        model.decoder[0].bias.zero_()
    fn.refresh()
    assert_agrees(fn, model, x, positions(model, 3, 2, 32))
    assert inside[0].shape == (3, 2)


# --- weights that change -------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["eager", "rewritten", "dense"])
def test_changed_weights_are_noticed_and_refresh_takes_them(route):
    model = ConvBernoulli()
    x, z = images(model, 2), positions(model, 3, 2, 32)
    fn = log_likelihood_and_grad(model, x, route)
    before = fn(z)[0]

    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.log_likelihood(x, z).mean().neg().backward()
    optimiser.step()
    with pytest.raises(RuntimeError, match="refresh"):
        fn(z)
    with pytest.raises(RuntimeError, match="refresh"):
        fn.log_likelihood(z)
    fn.refresh()
    assert_agrees(fn, model, x, positions(model, 3, 2, 32))
    assert not torch.equal(fn(z)[0], before)

    model.load_state_dict(ConvBernoulli().state_dict())
    with pytest.raises(RuntimeError, match="refresh"):
        fn(z)
    fn.refresh()
    assert_agrees(fn, model, x, positions(model, 3, 2, 32))


@pytest.mark.parametrize("route", ["eager", "rewritten", "dense"])
def test_refresh_takes_the_next_minibatch(route):
    model = ConvBernoulli()
    fn = log_likelihood_and_grad(model, images(model, 2), route)
    for num_images in (2, 5, 1):
        x = images(model, num_images)
        assert_agrees(fn.refresh(x), model, x, positions(model, 3, num_images, 32))
    x.zero_()  # the callable keeps its own copy
    before = fn(torch.zeros(1, 1, 32))[0]
    fn.refresh(x)
    assert fn(torch.zeros(1, 1, 32))[0] != before
    with pytest.raises(ValueError, match="x must hold zeros and ones"):
        fn.refresh(torch.full((2, 784), 0.5))


def test_packed_weights_stay_in_place_for_captured_graphs():
    model = ConvBernoulli()
    fn = log_likelihood_and_grad(model, torch.zeros(1, 784), "dense", dtype=torch.bfloat16)
    weights = [w for network in fn._networks for packed in network.weights for w in packed]
    assert len(weights) == 2 * 2 * 5  # two types, weight and bias, five layers
    with torch.no_grad():
        model.decoder[5].weight.mul_(2.0)
    fn.refresh()
    after = [w for network in fn._networks for packed in network.weights for w in packed]
    assert all(a is b for a, b in zip(weights, after, strict=True))
    z = positions(model, 4, 1, 32)
    exact = log_likelihood_and_grad(model, torch.zeros(1, 784), "dense")
    torch.testing.assert_close(fn.log_likelihood(z), exact(z)[0])
    torch.testing.assert_close(fn(z)[0], exact(z)[0], rtol=1e-2, atol=0)


# --- low precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["rewritten", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.06)])
def test_low_precision_forces_come_with_exact_energies(route, dtype, tolerance):
    model = confident(ConvBernoulli())
    x, z = images(model, 3), positions(model, 5, 3, 32)
    fn = log_likelihood_and_grad(model, x, route, dtype=dtype)
    value, grad = fn(z)
    expected_value, expected_grad = reference(model, x, z)
    assert value.dtype == grad.dtype == torch.float32
    assert (grad - expected_grad).norm() < tolerance * expected_grad.norm()
    torch.testing.assert_close(value, expected_value, rtol=tolerance / 100, atol=0)
    torch.testing.assert_close(fn.log_likelihood(z), expected_value, rtol=1e-5, atol=0)


def test_low_precision_energies_on_trained_weights():
    """What the option without exact energies costs, in nats, on the decoder of chapter 1."""
    model = ConvBernoulli()
    path = Path(__file__).parents[1] / "data/models/reference/vae-laptop-seed0-decoder.safetensors"
    load_weights(path, model, {"class": "ConvBernoulli", "latent_dim": 32})
    x, z = model.sample(2000)
    for dtype, bias, spread in [(torch.float16, 0.001, 0.02), (torch.bfloat16, 0.01, 0.15)]:
        fn = log_likelihood_and_grad(model, x, dtype=dtype)
        error = fn(z)[0] - fn.log_likelihood(z)
        assert error.mean().abs() < bias and error.std() < spread


def test_leapfrog_is_reversible_under_a_low_precision_force():
    model = confident(ConvBernoulli())
    fn = log_likelihood_and_grad(model, images(model, 1), dtype=torch.bfloat16)
    z, momentum = torch.randn(20, 1, 32), torch.randn(20, 1, 32)
    state = LeapfrogState(z, momentum, *fn(z))
    for _ in range(10):
        state = leapfrog_step(state, fn, 0.02)
    assert (state.z - z).norm() > 0.1 * z.norm()
    state = state._replace(momentum=-state.momentum)
    for _ in range(10):
        state = leapfrog_step(state, fn, 0.02)
    # Away from the rare z at which rounding to bfloat16 tips the other way on the return.
    error = (state.z - z).abs().amax(-1)
    assert error.median() < 1e-5


def small_problem():
    """A decoder with one latent, two images, and log p(x) by quadrature, [2]."""
    image = dict(stride=2, padding=2, output_padding=1, shape=(2, 4, 4))
    decoder = deconvolve(1, 5, **image, latent_dim=1, width=32)()
    model = confident(BernoulliDecoder(decoder, 1, 64))
    x = model.sample(2)[0]
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    with torch.no_grad():
        log_joint = model.double().log_joint(x.double(), grid[:, None, None].expand(-1, 2, 1))
    return model.float(), x, torch.logsumexp(log_joint + (grid[1] - grid[0]).log(), 0)


LOW = torch.bfloat16
WAYS = [("eager", None), *[(r, t) for r in ("rewritten", "dense") for t in (None, LOW)]]


@pytest.mark.parametrize(("route", "dtype"), WAYS)
def test_annealing_finds_the_evidence_on_every_route(route, dtype):
    model, x, truth = small_problem()
    fn = log_likelihood_and_grad(model, x, route, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    path = AnnealedPath(
        model.prior().log_prob, fn.log_likelihood, None, fn, exact_energies=dtype is not None
    )
    z0 = torch.randn(300, 2, 1, generator=generator)
    result = ais(path, z0, (sigmoid_schedule(30), 0.4, 2), generator=generator)
    estimate = log_mean_exp(result.log_weights, dim=0)
    weights = (result.log_weights - result.log_weights.logsumexp(0)).exp() * 300
    standard_error = weights.std(0) / 300**0.5
    assert ((estimate - truth).abs() < 4 * standard_error).all()
    assert standard_error.max() < 0.1
    assert result.acceptance_rate.mean() > 0.7


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(route="fastest"), "route must be one of auto, eager"),
        (dict(dtype=torch.float64), "dtype must be torch.float32, bfloat16 or float16"),
        (dict(route="eager", dtype=torch.bfloat16), "eager route runs in the model's own type"),
        (dict(chunk_size=0), "chunk_size must be an integer, at least 1; got 0"),
        (dict(chunk_size=2.5), "chunk_size must be an integer"),
        (dict(x=torch.zeros(784)), r"x must be \[N, 784\], N at least 1; got \(784,\)"),
        (dict(x=torch.zeros(2, 28, 28)), r"got \(2, 28, 28\)"),
        (dict(x=torch.zeros(0, 784)), "N at least 1"),
        (dict(x=torch.full((2, 784), 0.5)), "x must hold zeros and ones, not 0.5 to 0.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood_and_grad(**{"model": ConvBernoulli(), "x": torch.zeros(2, 784), **arguments})


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(4, 2, 31), r"B = 2, D = 32\]; got shape \(4, 2, 31\)"),
        (torch.zeros(2, 4, 32), r"got shape \(2, 4, 32\)"),
        (torch.zeros(4, 1, 32), r"got shape \(4, 1, 32\)"),
        (torch.zeros(32), r"got shape \(32,\)"),
        (torch.zeros(4, 2, 32, dtype=torch.float64), "z must be torch.float32 on cpu"),
    ],
)
def test_bad_positions_are_refused(z, message):
    fn = log_likelihood_and_grad(ConvBernoulli(), torch.zeros(2, 784))
    with pytest.raises(ValueError, match=message):
        fn(z)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((nn.Linear(3, 6), nn.Tanh()), "only the 'eager' route covers a decoder with Tanh()"),
        ((nn.ReLU(), nn.Linear(3, 6)), "ReLU"),
        ((nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), nn.Flatten()), "Unflatten"),
        ((nn.utils.parametrizations.weight_norm(nn.Linear(3, 6)),), "Linear"),
        ((nn.utils.spectral_norm(nn.Linear(3, 6)),), "hooks"),
    ],
)
def test_decoders_that_are_not_covered_say_so(layers, message):
    model = BernoulliDecoder(nn.Sequential(*layers), 3, 6)
    x = images(model, 2)
    for route in ("rewritten", "dense"):
        with pytest.raises(ValueError, match=message):
            log_likelihood_and_grad(model, x, route)
    assert log_likelihood_and_grad(model, x).route == "eager"


# --- CUDA and memory -----------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("route", ["eager", "rewritten", "dense"])
def test_routes_agree_with_autograd_on_cuda(route, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = ConvBernoulli()
    x = images(model, 3)
    # More numbers of chains than graphs kept.
    z = [positions(model, n, 3, 32).cuda() for n in (5, 7, 5, 9, 11, 13, 5)]
    model, x = model.cuda(), x.cuda()
    fn = log_likelihood_and_grad(model, x, route)
    assert log_likelihood_and_grad(model, x).route == "dense"

    for factor in (1.0, 1.01):  # a captured graph reads the new weights
        with torch.no_grad():
            model.decoder[5].weight.mul_(factor)
        fn.refresh()
        for z_n in z:
            for actual, expected in zip(fn(z_n), reference(model, x, z_n), strict=True):
                assert (actual - expected).norm() <= 1e-5 * expected.norm()
    if route == "dense":
        low = log_likelihood_and_grad(model, x, dtype=torch.bfloat16)
        value, grad = low(z[0])
        expected_value, expected_grad = reference(model, x, z[0])
        assert (grad - expected_grad).norm() < 0.2 * expected_grad.norm()
        torch.testing.assert_close(low.log_likelihood(z[0]), expected_value, rtol=1e-5, atol=0)
        torch.testing.assert_close(value, expected_value, rtol=2e-3, atol=0)


PEAK_MEMORY = """
import re, torch
from amortised.fast import log_likelihood_and_grad
from amortised.models import ConvBernoulli

def peak():  # not ru_maxrss, which starts from the memory of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

fn = log_likelihood_and_grad(ConvBernoulli(), torch.zeros(10, 784), "{route}")
fn(torch.randn(60, 10, 32))
few = peak()
fn(torch.randn(1000, 10, 32))
print((peak() - few) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("route", ["eager", "rewritten"])
def test_memory_does_not_grow_with_the_number_of_chains(route):
    # Unchunked, the activations of 10,000 chains take 800 MB and autograd's about twice that.
    output = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY.format(route=route)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert 0 < float(output) < 60  # MB; positions, gradients and values take 3
