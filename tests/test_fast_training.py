"""The fast path of training against the plain one, and steps that a CUDA graph can hold."""

from functools import partial

import pytest
import torch
from torch import nn

from amortised import adversarial, amc, data, fast, numerics, recipes
from amortised.adversarial import Discriminator
from amortised.cuda import CapturedFunction
from amortised.encoders import ImplicitEncoder
from amortised.experiments import load_studies, select
from amortised.fast import RefreshedLikelihood
from amortised.models import ConvBernoulli
from amortised.numerics import argument_validation
from amortised.recipes import Run

NUM_STEPS, BATCH = 100, 4
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(scope="module")
def grey():
    return data.load_mnist("train").images[: 8 * NUM_STEPS].reshape(NUM_STEPS, 8, 784)


def train(batches, *, fast, graph=False, device="cpu"):
    """Amortised MCMC for as many steps as there are batches: losses ``[steps, 3]``, the decoder."""
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(0)
        networks = {
            "model": ConvBernoulli(),
            "encoder": ImplicitEncoder(trunk=nn.Flatten(), num_features=784, num_hidden=32),
            "discriminator": Discriminator(trunk=nn.Flatten(), num_features=784, num_hidden=32),
        }
        optimizers = {}
        for name, network in networks.items():
            network.to(device, memory_format=torch.channels_last)  # as the recipes do
            rate = torch.tensor(1e-3, device=device) if graph else 1e-3
            optimizers[name] = torch.optim.Adam(network.parameters(), rate, capturable=graph)
        model = networks["model"]
        route = RefreshedLikelihood(model) if fast else None
        teacher = partial(amc.teacher_samples, model, num_steps=10, step_size=0.02, route=route)

        def step(x):
            return amc.amc_step(
                data.binarise(x),
                model,
                networks["encoder"],
                optimizers,
                teacher=teacher,
                discriminator=networks["discriminator"],
            )

        if graph:
            state = networks | {f"optimizer {k}": v for k, v in optimizers.items()}
            step = CapturedFunction(step, state)
        with argument_validation(not graph):
            losses = [torch.stack(list(step(x.to(device)).values())).cpu() for x in batches]
    return torch.stack(losses), model


def test_fast_drift_trains_as_the_plain_one(grey):
    plain, plain_model = train(grey, fast=False)
    fast, fast_model = train(grey, fast=True)
    # One draw of the noise, so that only rounding differs; it grows, since training is a feedback.
    assert (fast[:5] - plain[:5]).abs().max() < 1e-3
    assert ((fast - plain).abs() / plain.abs().clamp(min=1.0)).max() < 0.01
    assert plain[-10:, 0].mean() < 0.6 * plain[0, 0]  # and it is training indeed
    for name, value in plain_model.state_dict().items():
        assert (fast_model.state_dict()[name] - value).abs().max() < 0.01, name


# --- steps that a CUDA graph can hold ------------------------------------------------------------


ROWS = {
    f"{e.row} {e.config['rule']}": e.config
    for e in select(load_studies(), "amc_table1", scale="full", seed=0)
}
ROWS["mmd"] = ROWS["amc_cnn_g_t5 gan"] | {"rule": "mmd", "num_student_samples": 8}


def step_of(config, device):
    """A step of the recipe, on networks as the recipe makes them, and what it changes."""
    config = config | {"num_steps": min(config["num_steps"], 3), "training_images": 2 * BATCH}
    run = Run(*("amc_table1", "row", "full", 0), config, device, *[None] * 4)
    networks = recipes._amc_networks(run)
    optimizers = {
        "model" if name == "decoder" else name: recipes._adam(run, network, 1e-3)
        for name, network in networks.items()
        if name != "chains"
    }
    step = recipes._amc_step(config, networks, optimizers)
    changed = networks | {f"optimizer of {name}": o for name, o in optimizers.items()}
    return (lambda grey, index: step(data.binarise(grey), index)), changed


@pytest.mark.parametrize("row", ROWS)
def test_a_captured_step_looks_at_no_value(row, monkeypatch):
    """Tensors on the meta device have shapes and no values, so that looking at one is an error."""
    for module in (adversarial, fast, numerics):
        monkeypatch.setattr(module, "is_capturing", lambda: True)
    monkeypatch.setattr(recipes, "RefreshedLikelihood", partial(RefreshedLikelihood, route="dense"))
    # Normal.sample checks its scales where Python does not see it.
    monkeypatch.delattr(torch, "normal")
    step, _ = step_of(ROWS[row], torch.device("meta"))
    grey = torch.empty(BATCH, 784, device="meta")
    index = torch.empty(BATCH, dtype=torch.int64, device="meta")
    with argument_validation(False):
        for _ in range(2):
            assert all(loss.shape == () for loss in step(grey, index).values())


@needs_cuda
@pytest.mark.parametrize("row", ROWS)
def test_every_row_can_be_captured(row, grey):
    step, changed = step_of(ROWS[row], torch.device("cuda"))
    captured = CapturedFunction(step, changed)
    x, index = grey[0, :BATCH].cuda(), torch.arange(BATCH).cuda()
    with argument_validation(False):
        losses = [torch.stack(list(captured(x, index).values())).cpu() for _ in range(5)]
    losses = torch.stack(losses)
    assert losses.isfinite().all() and (losses[0] != losses[-1]).any()


@needs_cuda
def test_captured_step_trains_as_the_plain_one(grey):
    eager, _ = train(grey, fast=False, device="cuda")
    captured, model = train(grey, fast=True, graph=True, device="cuda")
    assert (captured[:3] - eager[:3]).abs().max() < 0.05
    assert ((captured - eager).abs() / eager.abs().clamp(min=1.0)).mean() < 0.05
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
