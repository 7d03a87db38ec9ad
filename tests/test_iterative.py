"""Iterative inference: closed forms of linear models, and the bookkeeping of training."""

import math
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from amortised import data, evaluation, recipes, results, runs
from amortised import iterative as it
from amortised.encoders import GaussianEncoder, bounded_log_scale
from amortised.files import load_tree
from amortised.models import (
    AncestralGaussian,
    BagOfWords,
    BernoulliDecoder,
    DeepLatentGaussian,
    LinearGaussian,
    conditional_normal,
)
from amortised.numerics import CallCounter
from amortised.studies import load_studies

DOUBLE = torch.float64


@pytest.fixture
def linear():
    """Three latents whose posterior is correlated, five observations, and their M = W'W/s2 + I."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=DOUBLE)
    model = LinearGaussian(weight, torch.randn(5, dtype=DOUBLE), 0.7).requires_grad_(False)
    precision = weight.T @ weight / 0.49 + torch.eye(3, dtype=DOUBLE)
    return model, torch.randn(4, 5, dtype=DOUBLE), precision


def exact_elbo(model, x, parameters, precision):
    """E_q log p(x | z) - KL(q || p(z)) for a linear decoder, in closed form."""
    mean, log_scale = parameters.chunk(2, -1)
    residual, variance = x - model.bias - mean @ model.weight.T, (2 * log_scale).exp()
    fit = -0.5 * (residual / 0.7).square().sum(-1) - 2.5 * math.log(2 * math.pi * 0.49)
    fit = fit - 0.5 * (variance * (precision.diagonal() - 1)).sum(-1)
    return fit - 0.5 * (mean.square() + variance - 1 - 2 * log_scale).sum(-1)


def small(observation="binary", dims=(3,), size=6, **options):
    """A small model, an encoder for it and observations, all in double precision."""
    torch.manual_seed(1)
    model = DeepLatentGaussian(dims, size, observation, num_hidden=7, num_layers=1).double()
    encoder = it.IterativeEncoder(sum(dims), size, num_hidden=8, num_layers=2, **options).double()
    x = torch.rand(5, size, dtype=DOUBLE)
    return model, encoder, x.round() if observation == "binary" else (9 * x).floor()


def grads(network):
    return [p.grad.clone() for p in network.parameters()]


def clear(*networks):
    for network in networks:
        network.zero_grad(set_to_none=True)


def plain(network):
    return torch.optim.SGD(network.parameters(), lr=0.0)


# --- the gradient --------------------------------------------------------------------------------


def test_gradient_is_the_affine_map_of_x_of_the_same_draws(linear):
    """A x + b with A = W'/s2 and b = -(W'(W z + bias)/s2 + z), means over the draws."""
    model, x, _ = linear
    state = it.start_at_prior(model, x)._replace(parameters=0.3 * torch.randn(4, 6, dtype=DOUBLE))
    state = it.look(model, state, num_samples=7)
    z, mean, log_scale = state.terms.z, *state.parameters.chunk(2, -1)
    matrix = model.weight.T / 0.49
    pathwise = -(matrix @ (model.weight @ z.mT + model.bias[:, None])).mT  # [7, 4, 3]
    expected = x @ matrix.T + pathwise.mean(0) - mean  # the divergence is in closed form
    assert torch.allclose(state.gradient[:, :3], expected, atol=1e-5)
    # In log sigma: the same errors times the noise, and 1 - sigma^2 from the divergence.
    noise = z - mean
    below = ((x @ matrix.T + pathwise) * noise).mean(0)
    assert torch.allclose(state.gradient[:, 3:], below + 1 - (2 * log_scale).exp(), atol=1e-5)


def test_two_levels_push_up_and_pull_down():
    """For z1: J'(x - mu_x)/s2 - (z1 - mu_p)/s_p^2; for z2: J'(z1 - mu_p)/s_p^2 - z2."""
    torch.manual_seed(2)
    model = DeepLatentGaussian((3, 2), 6, "real", num_hidden=7, num_layers=1).double()
    x = torch.randn(4, 6, dtype=DOUBLE)
    mean = torch.randn(4, 5, dtype=DOUBLE)
    scale = torch.tensor([0.3, 0.5, 0.4, 0.6, 0.2], dtype=DOUBLE).log().expand(4, 5)
    state = it.look(model, it.InferenceState(x, torch.cat([mean, scale], -1)), 1)
    z1, z2 = (v.requires_grad_() for v in state.terms.z[0].detach().split([3, 2], -1))
    likelihood = model.likelihood(torch.cat([z1, z2.detach()], -1))
    prior = conditional_normal(model.prior(), torch.cat([z1, z2], -1))
    mu_p, s_p = prior.mean[:, :3], prior.stddev[:, :3]
    (bottom_up,) = torch.autograd.grad(likelihood.log_prob(x).sum(), z1)
    top_down = -(mean[:, :3] - mu_p) / s_p.square()
    assert torch.allclose(state.gradient[:, :3], bottom_up + top_down, atol=1e-9)
    variance = (2 * scale[:, :3]).exp() + (mean[:, :3] - mu_p.detach()).square()
    weights = [(mean[:, :3] - mu_p) / s_p.square(), (variance / s_p.square() - 1) / s_p]
    (bottom_up,) = torch.autograd.grad([mu_p, s_p], z2, [w.detach() for w in weights])
    assert torch.allclose(state.gradient[:, 3:5], bottom_up - mean[:, 3:], atol=1e-9)


# --- closed forms --------------------------------------------------------------------------------


def newton_step(state, precision):
    """A linear map of (mu, gradient) to the best mean; the scales that are best for it."""
    mean = state.parameters[:, :3] + torch.linalg.solve(precision, state.gradient[:, :3].T).T
    best = (-0.5 * precision.diagonal().log()).expand_as(mean)
    return torch.cat([mean, best], -1)


def test_newton_step_reaches_the_best_mean_field_in_one_step(linear):
    model, x, precision = linear
    start = torch.cat([3 * torch.randn(4, 3), torch.full((4, 3), -20.0)], -1).double()
    trace = it.refine(model, partial(newton_step, precision=precision), x, 1, start=start)
    assert torch.allclose(trace.parameters[1, :, :3], model.posterior(x).mean, atol=1e-6)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    reached = exact_elbo(model, x, trace.parameters[1], precision)
    assert torch.allclose(model.log_evidence(x) - reached, gap.expand(4), atol=1e-6) and gap > 0.1
    drawn, _ = it.level_elbo(model, it.gaussian(trace.parameters[1]), x, 200_000)
    assert torch.allclose(drawn, reached, atol=0.05)


def test_gradient_ascent_finds_the_optimum_for_each_example(linear):
    model, x, _ = linear
    for optimizer in (partial(torch.optim.SGD, lr=0.02), partial(torch.optim.Adam, lr=0.05)):
        step = it.gradient_ascent(optimizer)
        trace = it.refine(model, step, x, 150, num_samples=64)
        assert torch.allclose(trace.parameters[-1, :, :3], model.posterior(x).mean, atol=0.15)
        again = it.refine(model, step, x[1:2], 150, num_samples=64)  # its state begins anew
        assert torch.allclose(again.parameters[-1], trace.parameters[-1, 1:2], atol=0.25)


def test_levels_of_a_linear_hierarchy_have_their_exact_bound():
    """z2 ~ N(0,1), z1 | z2 ~ N(2 z2, .5), x | z1 ~ N(z1, 1); q with one mean for each level."""

    class Chain(DeepLatentGaussian):
        def _conditional_prior(self, z):
            z2 = z[..., 1:]
            scale = torch.tensor([0.5, 1.0], dtype=z.dtype)
            return Normal(torch.cat([2 * z2, torch.zeros_like(z2)], -1), scale)

        def likelihood(self, z):
            return Independent(Normal(z[..., :1], 1.0), 1)

    model, x = Chain((1, 1), 1).double(), torch.tensor([[0.7]], dtype=DOUBLE)
    m1, m2, s1, s2 = 0.4, -0.3, 0.6, 0.8
    q = it.gaussian(torch.tensor([[m1, m2, math.log(s1), math.log(s2)]], dtype=DOUBLE))
    fit = -0.5 * math.log(2 * math.pi) - 0.5 * ((0.7 - m1) ** 2 + s1**2)
    lower = math.log(0.5 / s1) + (s1**2 + (m1 - 2 * m2) ** 2 + 4 * s2**2) / 0.5 - 0.5
    upper = -math.log(s2) + 0.5 * (s2**2 + m2**2 - 1)
    torch.manual_seed(0)
    elbo, divergences = it.level_elbo(model, q, x, 100_000)
    assert elbo.item() == pytest.approx(fit - lower - upper, abs=0.03)
    assert divergences[0, 0].item() == pytest.approx(lower, abs=0.03)
    assert divergences[0, 1].item() == pytest.approx(upper, abs=1e-9)
    # The evidence is N(x; 0, 1 + .25 + 4): importance weights from this q must find it.
    found = evaluation.importance_sampling_ll(model, lambda x: q, x, num_samples=20_000)
    exact = -0.5 * math.log(2 * math.pi * 5.25) - 0.5 * 0.49 / 5.25
    assert found.log_likelihood.item() == pytest.approx(exact, abs=0.05)


def test_ancestral_law_samples_what_its_density_says():
    model, _, _ = small(dims=(2, 2, 1))
    torch.manual_seed(3)
    prior = model.prior()
    z = prior.sample((50_000,))
    assert z.shape == (50_000, 5) and abs(z[:, 4].var() - 1) < 0.05
    mean = conditional_normal(prior, z).mean  # a level is centred on what those above predict
    assert ((z - mean).mean(0).abs() < 0.05).all() and mean[:, :4].std(0).min() > 0.01
    assert not torch.allclose(mean[:, 2:4], mean[:1, 2:4])
    moved = z.clone()
    moved[:, :2] += 1.0  # of lower levels nothing above depends
    assert torch.equal(conditional_normal(prior, moved).mean, mean)


def test_ladder_weighs_its_estimate_against_the_prior_by_precision():
    torch.manual_seed(4)
    model, x = DeepLatentGaussian((2, 1), 6, num_hidden=5).double(), torch.rand(3, 6).double()
    encoder = it.LadderEncoder((2, 1), 6, num_hidden=5).double()
    q, z = encoder(x, model), torch.randn(3, 3, dtype=DOUBLE)
    h = encoder.trunks[0](x - 0.5)
    mean, raw = encoder.heads[0](h).chunk(2, -1)
    prior, found = conditional_normal(model.prior(), z), q.conditional(z)
    a, b = (-2 * bounded_log_scale(raw)).exp(), prior.stddev[:, :2] ** -2
    assert torch.allclose(found.mean[:, :2], (a * mean + b * prior.mean[:, :2]) / (a + b))
    assert torch.allclose(found.variance[:, :2], 1 / (a + b))
    top = encoder.heads[1](encoder.trunks[1](h))  # the top level is the estimate itself
    assert torch.allclose(found.mean[:, 2:], top[:, :1])
    assert isinstance(q, AncestralGaussian) and q.batch_shape == (3,)


# --- encoders ------------------------------------------------------------------------------------


def test_gate_one_leaves_the_parameters_unchanged():
    _, encoder, x = small()
    state = it.InferenceState(x, torch.randn(5, 6).double(), gradient=torch.randn(5, 6).double())
    nn.init.constant_(encoder.gate.bias, 1e4)
    assert torch.equal(encoder(state), state.parameters)


def test_without_gate_and_with_x_alone_it_is_the_standard_encoder_bit_for_bit():
    model, encoder, x = small(inputs=("x",), gated=False)
    standard = GaussianEncoder(3, trunk=nn.Identity(), num_features=8).double()
    standard.trunk, standard.head = encoder.trunk, encoder.head
    q, reference = it.posterior(model, encoder, x, 1), standard(x - 0.5)
    assert torch.equal(q.mean, reference.mean) and torch.equal(q.stddev, reference.stddev)
    torch.manual_seed(6)
    ours = it.level_elbo(model, q, x, 3)[0]
    torch.manual_seed(6)
    assert torch.equal(ours, it.level_elbo(model, reference, x, 3)[0])
    torch.manual_seed(7)
    it.iterative_step(x, model, encoder, [plain(model), plain(encoder)], num_iterations=1)
    found = grads(encoder)
    clear(encoder, model)
    torch.manual_seed(7)
    (-it.level_elbo(model, standard(x - 0.5), x, 1)[0].mean()).backward()
    assert all(torch.allclose(a, b, atol=1e-15) for a, b in zip(found, grads(encoder), strict=True))


@pytest.mark.parametrize("name", it.INPUTS)
def test_each_input_is_read_as_documented(name):
    model, _, x = small()
    state = it.look(model, it.start_at_prior(model, x), 4)
    mean = torch.sigmoid(model.decoder(state.terms.z)).mean(0)
    g = state.gradient
    expected = {
        "x": x - 0.5,
        "gradient": (g - g.mean(-1, True)) / (g.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
        "log_gradient": torch.cat([torch.log(abs(g) + 1e-5), g.sgn()], -1),
        "errors": torch.cat([x - mean, state.terms.z.mean(0)], -1),
        "estimates": torch.zeros(5, 6, dtype=DOUBLE),
    }[name]
    assert torch.allclose(state.read(name), expected, atol=1e-12)
    assert (
        it.IterativeEncoder(3, 6, [name], num_hidden=4).trunk.skip.in_features == expected.shape[1]
    )


@pytest.mark.parametrize("inputs", [(), ("x", "x"), ("pixels",)])
def test_inputs_that_do_not_exist_are_refused(inputs):
    with pytest.raises(ValueError, match="inputs must be some of x, gradient"):
        it.IterativeEncoder(3, 6, inputs)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "passes"), [({}, 5), ({"inputs": ("x", "estimates")}, 4)])
def test_t_iterations_decode_t_plus_one_times(options, passes, monkeypatch):
    model, encoder, x = small(**options)
    counter = CallCounter(model.likelihood)
    monkeypatch.setattr(model, "likelihood", counter)
    it.iterative_step(x, model, encoder, [plain(model), plain(encoder)], num_iterations=4)
    assert counter.calls == passes


@pytest.mark.parametrize("dims", [(3,), (2, 1)])
def test_encoder_gradient_is_the_mean_and_decoder_gradient_the_last(dims):
    model, encoder, x = small(dims=dims, inputs=("x", "log_gradient", "errors", "estimates"))
    torch.manual_seed(8)
    losses = it.iterative_step(x, model, encoder, [plain(model), plain(encoder)], num_iterations=3)
    of_encoder, of_model = grads(encoder), grads(model)
    torch.manual_seed(8)
    state, separate = it.look(model, it.start_at_prior(model, x)), []
    for _ in range(3):  # each iteration by itself: draw, differentiate, cut
        parameters = encoder(state)
        stream = torch.random.get_rng_state()
        clear(encoder, model)
        elbo = it.level_elbo(model, it.gaussian(parameters), x, 1)[0]
        (-elbo.mean()).backward()
        separate.append(grads(encoder))
        last = grads(model)
        torch.random.set_rng_state(stream)
        state = it.look(model, state._replace(parameters=parameters))
    for found, three in zip(of_encoder, zip(*separate, strict=True), strict=True):
        assert torch.allclose(found, sum(three) / 3, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(of_model, last, strict=True))
    assert losses["loss"] == pytest.approx(-state.elbo.mean().item())


def test_encoder_alone_learns_where_the_model_is_not_to():
    model, encoder, x = small()
    model.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(encoder.parameters(), 0.01)
    losses = [
        it.iterative_step(x, model, encoder, [optimizer], num_iterations=2, num_samples=8)["loss"]
        for _ in range(150)
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    best = it.refine(
        model, it.gradient_ascent(partial(torch.optim.Adam, lr=0.05)), x, 300, num_samples=8
    )
    reached, optimum = -torch.stack(losses[-20:]).mean(), best.elbo[-20:].mean()
    assert optimum - 0.15 < reached < optimum + 0.05


@pytest.mark.parametrize("kind", ["standard", "iterative", "ladder"])
@pytest.mark.parametrize("observation", ["binary", "real", "counts"])
def test_every_kind_learns_every_kind_of_observation(kind, observation):
    dims, counts = (3, 2), observation == "counts"
    options = {"inputs": ("x", "gradient", "estimates"), "counts": counts}
    if kind == "standard":
        options |= {"inputs": ("x",), "gated": False}
    model, encoder, x = small(observation, dims, **options)
    if kind == "ladder":
        encoder = it.LadderEncoder(dims, 6, counts, num_hidden=8).double()
    optimizers = [torch.optim.Adam(n.parameters(), 0.01) for n in (model, encoder)]
    torch.manual_seed(0)
    losses = [
        it.iterative_step(x, model, encoder, optimizers, num_iterations=2)["loss"].item()
        for _ in range(60)
    ]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1.0
    q = it.posterior(model, encoder, x, 2)
    elbo = it.level_elbo(model, q, x, 500)[0].mean()
    bound = evaluation.importance_sampling_ll(
        model, lambda x: it.posterior(model, encoder, x, 2), x, num_samples=500
    ).log_likelihood.mean()
    assert elbo < bound + 0.1


def test_bag_of_words_is_the_law_of_the_words_in_order():
    logits = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE)
    p = logits.exp() / logits.exp().sum()
    expected = 2 * p[0].log() + 3 * p[2].log()
    assert torch.allclose(BagOfWords(logits).log_prob(torch.tensor([2.0, 0.0, 3.0])), expected)


# --- refinement ----------------------------------------------------------------------------------


def test_refinement_returns_its_start_and_tightens_the_bound_but_not_the_evidence(linear):
    model, x, precision = linear
    encoder_start = torch.zeros(4, 6, dtype=DOUBLE)
    step = it.gradient_ascent(partial(torch.optim.SGD, lr=0.02))
    torch.manual_seed(0)
    trace = it.refine(model, step, x, 40, start=encoder_start, num_samples=50)
    assert trace.elbo.shape == (41, 4) and torch.equal(trace.parameters[0], encoder_start)
    bounds = [exact_elbo(model, x, trace.parameters[t], precision) for t in (0, 40)]
    assert (bounds[1] > bounds[0] + 0.5).all()
    for t in (0, 40):
        q = it.gaussian(trace.parameters[t])
        ll = evaluation.importance_sampling_ll(model, lambda x, q=q: q, x, num_samples=10_000)
        assert torch.allclose(ll.log_likelihood, model.log_evidence(x), atol=0.15)


def test_bad_starts_and_divergence_are_named(linear):
    model, x, _ = linear
    keep = it.gradient_ascent(partial(torch.optim.SGD, lr=1e9))
    with pytest.raises(ValueError, match=r"start must be \(mean, log scale\), \(4, 6\)"):
        it.refine(model, keep, x, 1, start=torch.zeros(4, 3, dtype=DOUBLE))
    with pytest.raises(FloatingPointError, match="not finite at iteration"):
        it.refine(model, keep, x, 5)
    with pytest.raises(ValueError, match="observation must be binary, real or counts"):
        DeepLatentGaussian([2], 3, "grey")
    with pytest.raises(ValueError, match=r"latent_dims\[1\] must be an integer"):
        DeepLatentGaussian([2, 0], 3)


def test_prior_is_the_start_and_plain_decoders_can_be_refined():
    model = BernoulliDecoder(nn.Linear(2, 4), 2, 4)
    assert not it.start_at_prior(model, torch.zeros(3, 4)).parameters.any()
    deep = DeepLatentGaussian((2, 1), 4, num_hidden=3)
    state = it.start_at_prior(deep, torch.zeros(3, 4))
    prior = conditional_normal(deep.prior(), torch.zeros(1, 3))
    assert torch.allclose(state.parameters[:, :3], prior.mean.expand(3, 3))
    assert torch.allclose(state.parameters[:, 3:], prior.stddev.log().expand(3, 3))


# --- the studies ---------------------------------------------------------------------------------

TINY = {"training_images": 40, "epochs": 1, "batch_size": 10, "images": 4, "num_samples": 5}
TINY |= {"svi_images": 3, "svi_steps": 2, "num_hidden": 5, "posthoc_epochs": 1}


@pytest.fixture(scope="module")
def data_sets():
    """Little data sets in place of those that may not be handed on."""
    levels = torch.randint(256, (60, 3072), generator=torch.Generator().manual_seed(0))
    words = torch.poisson(torch.ones(60, 1995), torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_cifar10", lambda split: levels.to(torch.uint8))
        patch.setattr(data, "load_newsgroups", lambda split: words)
        patch.setattr(data, "load_rcv1", lambda split: words.repeat(1, 6)[:, :10_000].to_sparse())
        patch.setattr(data, "load_mnist", cache(data.load_mnist))
        patch.setattr(data, "load_mnist_binary", cache(data.load_mnist_binary))
        yield


def rows():
    """One run for each combination of data, method, levels and inputs."""
    found = {}
    for study in load_studies().values():
        for e in study:
            if e.recipe == "iterative":
                names = ("dataset", "method", "inputs")
                key = *map(str, map(e.config.get, names)), len(e.config["latent_dims"])
                found.setdefault(key, e)
    return list(found.values())


@pytest.mark.parametrize("experiment", rows(), ids=lambda e: e.name)
@pytest.mark.usefixtures("data_sets")
def test_a_row_is_trained_and_evaluated(experiment, tmp_path):
    config = experiment.config | TINY
    spec = experiment._asdict() | {"config": config, "builds_on": None}
    spec["config_hash"] = results.config_hash(config)
    del spec["needs"]
    folder = tmp_path / runs.folder_name(spec)
    runs.write_json(folder / "run.json", spec)
    record = runs.execute(folder)
    assert record["status"] == "done" and record["details"]["steps"] == 4
    values = load_tree(folder / "per_image.stage")
    assert all(value.isfinite().all() for value in values.values())
    assert values["elbo"].mean() < values["is_ll"].mean() + 1 and values["svi_gain"].shape == (3,)
    model = evaluation.load_module(folder / "decoder.safetensors")
    size = recipes.OBSERVATIONS[config["dataset"]][1]
    assert model.observation_dim == size and model.latent_dims == tuple(config["latent_dims"])
    if config["dataset"] == "cifar10":
        nats = 3072 * (math.log(256) - values["bits_per_dim"] * math.log(2))
        assert torch.allclose(nats, values["is_ll"], rtol=1e-4)
    if config["dataset"] in ("20news", "rcv1"):
        words = recipes.held_out_examples(config).sum(-1)
        assert torch.allclose(values["nats_per_word"] * words, -values["is_ll"], rtol=1e-4)
    for level in range(1, len(config["latent_dims"]) + 1):
        assert (values[f"kl_level_{level}"] > 0).all()
