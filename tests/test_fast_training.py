"""The fast path of training against the plain one, and steps that a CUDA graph can hold."""

from functools import partial

import pytest
import torch

from amortised import adversarial, data, fast, numerics, recipes
from amortised.cuda import CapturedFunction
from amortised.experiments import load_studies, select
from amortised.fast import RefreshedLikelihood
from amortised.numerics import argument_validation
from amortised.recipes import amortised_mcmc

NUM_STEPS, BATCH = 100, 8
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ROWS = {
    f"{e.row} {e.config['rule']}": e.config
    for e in select(load_studies(), "amc_table1", scale="full", seed=0)
}
ROWS["mmd"] = ROWS["amc_cnn_g_t5 gan"] | {"rule": "mmd", "num_student_samples": 8}


@pytest.fixture(scope="module")
def grey():
    return data.load_mnist("train").images[: BATCH * NUM_STEPS].reshape(NUM_STEPS, BATCH, 784)


def step_of(row, device, *, plain=False, graph=False, num_steps=3):
    """The step of a row on grey images and their numbers, and its decoder."""
    config = ROWS[row] | {"training_images": BATCH, "chain_dtype": "float32"}
    config["num_steps"] = min(config["num_steps"], num_steps)
    training = recipes.amc_training(config, device, plain=plain)

    def step(grey, index):
        return training.step(data.binarise(grey), index)

    state = training.networks | {f"{k} optimizer": o for k, o in training.optimizers.items()}
    return CapturedFunction(step, state) if graph else step, training.networks["decoder"]


def train(batches, device="cpu", **options):
    """Amortised MCMC, a step for each batch: losses ``[steps, losses]`` and the decoder."""
    torch.manual_seed(0)
    step, decoder = step_of("amc_cnn_g_t5 gan", device, num_steps=5, **options)
    index = torch.arange(BATCH, device=device)
    with argument_validation(False):
        losses = [list(step(x.to(device), index).values())[:3] for x in batches]
    return torch.stack([torch.stack(values).cpu() for values in losses]), decoder


def test_fast_drift_trains_as_the_plain_one(grey):
    plain, plain_model = train(grey, plain=True)
    fast, fast_model = train(grey)
    # One draw of the noise, so that only rounding differs; it grows, since training is a feedback.
    assert (fast[:5] - plain[:5]).abs().max() < 1e-3
    assert ((fast - plain).abs() / plain.abs().clamp(min=1.0)).max() < 0.01
    assert plain[-10:, 0].mean() < 0.6 * plain[0, 0]  # and it is training indeed
    for name, value in plain_model.state_dict().items():
        assert (fast_model.state_dict()[name] - value).abs().max() < 0.01, name


@pytest.mark.parametrize("row", ROWS)
def test_a_captured_step_looks_at_no_value(row, monkeypatch):
    """Tensors on the meta device have shapes and no values, so that looking at one is an error."""
    for module in (adversarial, fast, numerics):
        monkeypatch.setattr(module, "is_capturing", lambda: True)
    monkeypatch.setattr(
        amortised_mcmc, "RefreshedLikelihood", partial(RefreshedLikelihood, route="dense")
    )
    # Normal.sample checks its scales where Python does not see it.
    monkeypatch.delattr(torch, "normal")
    step, _ = step_of(row, torch.device("meta"))
    grey = torch.empty(BATCH, 784, device="meta")
    index = torch.empty(BATCH, dtype=torch.int64, device="meta")
    with argument_validation(False):
        for _ in range(2):
            assert all(loss.shape == () for loss in step(grey, index).values())


@needs_cuda
@pytest.mark.parametrize("row", ROWS)
def test_every_row_can_be_captured(row, grey):
    step, _ = step_of(row, "cuda", graph=True)
    x, index = grey[0].cuda(), torch.arange(BATCH).cuda()
    with argument_validation(False):
        losses = torch.stack([torch.stack(list(step(x, index).values())) for _ in range(5)])
    assert losses.isfinite().all() and (losses[0] != losses[-1]).any()


@needs_cuda
def test_captured_step_trains_as_the_plain_one(grey):
    eager, _ = train(grey, "cuda", plain=True)
    captured, model = train(grey, "cuda", graph=True)
    assert (captured[:3] - eager[:3]).abs().max() < 0.05
    assert ((captured - eager).abs() / eager.abs().clamp(min=1.0)).mean() < 0.05
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
