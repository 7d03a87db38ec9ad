"""Models of several seeds trained as one: each must become what it would become alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from amortised import amc, recipes
from amortised.adversarial import Discriminator
from amortised.encoders import GaussianEncoder, ImplicitEncoder
from amortised.fast import RefreshedLikelihood, log_likelihood_and_grad
from amortised.models import BernoulliDecoder, ConvBernoulli
from amortised.side_by_side import Blocks, side_by_side

NUM_MODELS, BATCH, LATENT_DIM, NUM_PIXELS = 3, 4, 2, 16


@pytest.fixture(autouse=True)
def _own_random_stream():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# --- blocks --------------------------------------------------------------------------------------


def test_each_member_sees_its_block_alone():
    members = [nn.Linear(2, 3) for _ in range(NUM_MODELS)]
    x = torch.randn(5, NUM_MODELS * BATCH, 2)
    parts = [member(x[:, BATCH * s : BATCH * (s + 1)]) for s, member in enumerate(members)]
    assert torch.equal(Blocks(members)(x), torch.cat(parts, dim=1))


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="a batch of 7 has no 3 equal blocks"):
        Blocks([nn.Identity()] * 3)(torch.zeros(7, 2))
    with pytest.raises(ValueError, match="a batch of 4 has no 3 equal blocks"):
        side_by_side([ConvBernoulli() for _ in range(3)]).logits(torch.zeros(4, 32))


def test_what_cannot_stand_side_by_side_is_refused():
    with pytest.raises(TypeError, match="one kind; got Linear, ReLU"):
        side_by_side([nn.Linear(1, 1), nn.ReLU()])
    with pytest.raises(TypeError, match="Linear has weight, bias outside of its children"):
        side_by_side([nn.Linear(1, 1), nn.Linear(1, 1)])


def test_members_are_trained_in_place():
    members = [GaussianEncoder(2, nn.Identity(), num_features=3) for _ in range(2)]
    before = [member.head.weight.clone() for member in members]
    joint = side_by_side(members)
    joint(torch.ones(2, 3)).mean.sum().backward()
    torch.optim.SGD(joint.parameters(), lr=1.0).step()
    for member, weight in zip(members, before, strict=True):
        assert not torch.equal(member.head.weight, weight)


# --- the dense route -----------------------------------------------------------------------------


def small_decoder() -> BernoulliDecoder:
    decoder = nn.Sequential(
        nn.Linear(8, 32),
        nn.ReLU(),
        nn.Unflatten(1, (2, 4, 4)),
        nn.ConvTranspose2d(2, 3, 5, stride=2, padding=2, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 3, padding=1),
        nn.Flatten(),
    )
    return BernoulliDecoder(decoder, 8, 64)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def decoders(request):
    return [small_decoder().to(memory_format=request.param) for _ in range(NUM_MODELS)]


def alone(decoders, x, z, **settings):
    """Values and gradients of each decoder at its own block, put together."""
    parts = zip(decoders, x.chunk(NUM_MODELS), z.chunk(NUM_MODELS), strict=True)
    found = [log_likelihood_and_grad(d, x, "dense", **settings)(z) for d, x, z in parts]
    return [torch.cat(values) for values in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.01)]
)
def test_dense_route_of_several_is_that_of_each(decoders, dtype, tolerance):
    model = side_by_side(decoders)
    x = torch.bernoulli(torch.full((NUM_MODELS * BATCH, 64), 0.3))
    route = RefreshedLikelihood(model, route="dense", dtype=dtype)
    for _ in range(2):  # again, after the weights have changed
        z = torch.randn(1, NUM_MODELS * BATCH, 8)
        value, grad = route(x)(z)
        expected_value, expected_grad = alone(decoders, x, z[0], dtype=dtype)
        assert value.shape == (1, NUM_MODELS * BATCH) and grad.shape == z.shape
        torch.testing.assert_close(value[0], expected_value, rtol=tolerance, atol=0.0)
        scale = expected_grad.abs().max()
        assert (grad[0] - expected_grad).abs().max() <= tolerance * scale
        exact = log_likelihood_and_grad(model, x, "eager")(z)
        torch.testing.assert_close(route(x).log_likelihood(z), exact[0], rtol=1e-5, atol=0.0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)


def test_routes_that_do_not_cover_models_side_by_side(decoders):
    model, x = side_by_side(decoders), torch.zeros(NUM_MODELS * BATCH, 64)
    assert log_likelihood_and_grad(model, x).route == "eager"
    with pytest.raises(ValueError, match="side by side have the routes 'dense' and 'eager'"):
        log_likelihood_and_grad(model, x, "rewritten")
    with pytest.raises(ValueError, match="one chain for each observation on this route; got 2"):
        log_likelihood_and_grad(model, x, "dense")(torch.zeros(2, NUM_MODELS * BATCH, 8))
    value, grad = log_likelihood_and_grad(model, x)(torch.zeros(2, NUM_MODELS * BATCH, 8))
    assert value.shape == (2, NUM_MODELS * BATCH) and grad.shape == (2, NUM_MODELS * BATCH, 8)


# --- training ------------------------------------------------------------------------------------


class SameNoise(TorchFunctionMode):
    """Random numbers that are the same in each block of rows, and the same at each entry."""

    NORMAL = (torch.randn, torch.randn_like, torch.normal, torch.Tensor.normal_)
    UNIFORM = (torch.rand, torch.rand_like, torch.bernoulli)

    def __init__(self, num_blocks: int):
        super().__init__()
        self.num_blocks, self.generator = num_blocks, torch.Generator().manual_seed(5)

    def __torch_function__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        if function not in self.NORMAL + self.UNIFORM:
            return result
        *before, rows, columns = result.shape
        draw = torch.randn if function in self.NORMAL else torch.rand
        shape = (*before, rows // self.num_blocks, columns)
        with torch._C.DisableTorchFunction():
            noise = draw(shape, generator=self.generator, dtype=torch.float64)
            noise = noise.repeat(*[1] * len(before), self.num_blocks, 1)
            if function is torch.bernoulli:
                noise = noise < arguments[0]
            elif function is torch.normal:
                noise = arguments[0] + arguments[1] * noise
            return result.copy_(noise)


def networks_of(config: dict, seed: int) -> dict[str, nn.Module]:
    """Small networks in double precision, where rounding is no excuse."""
    torch.manual_seed(seed)
    trunk = {"trunk": nn.Sequential(nn.Linear(NUM_PIXELS, 6), nn.Tanh()), "num_features": 6}
    decoder = nn.Sequential(nn.Linear(LATENT_DIM, 8), nn.ReLU(), nn.Linear(8, NUM_PIXELS))
    networks = {"decoder": BernoulliDecoder(decoder, LATENT_DIM, NUM_PIXELS)}
    if config["encoder"] == "gaussian":
        networks["encoder"] = GaussianEncoder(LATENT_DIM, **trunk)
    elif config["encoder"] != "none":
        noise = {"cnn_g": "gaussian", "cnn_b": "bernoulli"}[config["encoder"]]
        networks["encoder"] = ImplicitEncoder(LATENT_DIM, noise, **trunk, num_hidden=8)
    if recipes._is_game(config):
        trunk = {"trunk": nn.Sequential(nn.Linear(NUM_PIXELS, 6), nn.Tanh()), "num_features": 6}
        networks["discriminator"] = Discriminator(LATENT_DIM, **trunk, num_hidden=8)
    if config["method"] == "persistent":
        networks["chains"] = amc.PersistentChains(2 * BATCH, LATENT_DIM)
    return {name: network.double() for name, network in networks.items()}


def train(config: dict, networks: dict, num_models: int, images) -> None:
    """Ten steps of the recipe, with the noise that every block gets alike."""
    optimizers = {}
    for name in ("decoder", "encoder", "discriminator"):
        if name in networks:
            parameters, epsilon = networks[name].parameters(), 1e-3 / num_models
            key = "model" if name == "decoder" else name
            optimizers[key] = torch.optim.Adam(parameters, lr=0.01, eps=epsilon)
    step = recipes._amc_step(config, networks, optimizers)
    with SameNoise(num_models):
        for number in range(10):
            index = (torch.arange(BATCH) + number) % (2 * BATCH)
            first = 2 * BATCH * torch.arange(num_models).unsqueeze(1)
            step(images[index].repeat(num_models, 1), (first + index).flatten())


CHAIN = {"kernel": "langevin", "num_steps": 3, "step_size": 0.1}
ROWS = {
    "vae": {"method": "vae", "encoder": "gaussian"},
    "mcmc_vi": {"method": "mcmc_vi", "encoder": "gaussian"} | CHAIN,
    "amc gan": {"method": "amc", "encoder": "cnn_g", "rule": "gan"} | CHAIN,
    "amc bernoulli": {"method": "amc", "encoder": "cnn_b", "rule": "gan"} | CHAIN,
    "amc wasserstein": {"method": "amc", "encoder": "cnn_g", "rule": "wasserstein"} | CHAIN,
    "amc inclusive": {"method": "amc", "encoder": "gaussian", "rule": "inclusive_kl"} | CHAIN,
    "avb": {"method": "avb", "encoder": "cnn_g"},
    "persistent": {"method": "persistent", "encoder": "none"} | CHAIN,
}
DEFAULTS = {
    "kernel": "none",
    "rule": "none",
    "num_steps": 0,
    "step_size": 0.0,
    "num_leapfrog_steps": 1,
    "num_critic_steps": 2,
    "num_student_samples": 1,
    "chain_dtype": "float32",
}


@pytest.mark.parametrize("row", ROWS)
def test_each_of_three_becomes_what_it_would_become_alone(row, monkeypatch):
    config = DEFAULTS | ROWS[row]
    monkeypatch.setitem(recipes.DTYPES, "float32", torch.float64)
    monkeypatch.setattr(
        recipes, "RefreshedLikelihood", lambda *a, **k: RefreshedLikelihood(*a, route="dense", **k)
    )
    images = torch.bernoulli(torch.full((2 * BATCH, NUM_PIXELS), 0.4)).double()
    together, apart = ([networks_of(config, seed) for seed in range(NUM_MODELS)] for _ in range(2))
    joint = recipes._side_by_side(together)
    train(config, joint, NUM_MODELS, images)
    for s, (one, alone) in enumerate(zip(together, apart, strict=True)):
        before = {name: copy_of(network) for name, network in alone.items()}
        train(config, alone, 1, images)
        for name in ("decoder", "encoder", "discriminator"):
            for key, value in alone.get(name, nn.Module()).state_dict().items():
                no_gradient = config["rule"] == "wasserstein" and key == "head.4.bias"
                assert torch.equal(value, before[name][key]) == no_gradient, (name, key)
                torch.testing.assert_close(
                    one[name].state_dict()[key], value, rtol=1e-9, atol=1e-11
                )
        if "chains" in alone:
            own = joint["chains"].z[:, 2 * BATCH * s : 2 * BATCH * (s + 1)]
            torch.testing.assert_close(own, alone["chains"].z, rtol=1e-9, atol=1e-11)


def copy_of(network: nn.Module) -> dict:
    return {key: value.clone() for key, value in network.state_dict().items()}
