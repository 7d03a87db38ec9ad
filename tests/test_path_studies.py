"""Studies of chains inside the bound: every row for a few updates, and what is compared."""

import math

import pytest
import torch

from amortised import experiments, recipes, results, targets
from amortised.hvae import Path
from amortised.recipes import Run, chain_bounds
from amortised.studies import PathVaeOptions, load_studies

STUDIES = load_studies()
BOUNDS = {e.row: e for e in STUDIES["chain_bounds"] if (e.seed, e.scale) == (0, "laptop")}
TARGETS = {e.row: e for e in STUDIES["chain_targets"] if (e.seed, e.scale) == (0, "laptop")}
SMALL = {"training_images": 20, "epochs": 1, "batch_size": 10, "images": 3, "num_samples": 4}
SMALL |= {"num_chains": 2, "pilot_chains": 1, "num_temperatures": 3, "simulated_pairs": 2}


def test_rows_share_everything_but_their_path():
    own = {
        "path",
        "num_steps",
        "tempering",
        "acceptance",
        "kept_momentum",
        "varied",
        "encoder",
        "epochs",
    }
    shared = [{k: v for k, v in e.config.items() if k not in own} for e in BOUNDS.values()]
    assert all(config == shared[0] for config in shared) and len(BOUNDS) == 26
    assert len({e.seed for e in STUDIES["chain_bounds"]}) == 3


@pytest.mark.parametrize("row", BOUNDS)
def test_a_row_learns(row):
    torch.manual_seed(0)
    training = recipes.path_training(BOUNDS[row].config)
    before = {k: v.clone() for k, v in training.networks["path"].state_dict().items()}
    x = torch.bernoulli(torch.full((4, 784), 0.2))
    losses = training.step(x, torch.arange(4))
    assert losses["loss"].isfinite() and ("acceptance" in losses) == row.startswith(("met", "ann"))
    after = training.networks["path"].state_dict()
    moved = [not torch.equal(before[k], after[k]) for k in before]
    assert bool(moved) == (training.details["path_parameters"] > 0)
    assert not moved or sum(moved) >= len(moved) // 3  # last layers start at zero


def test_the_wide_encoder_has_the_parameters_of_the_flow():
    torch.manual_seed(0)
    rows = ("vae", "wide_encoder", "always_realnvp_5")
    counts = [
        sum(p.numel() for n in training.networks.values() for p in n.parameters())
        for training in (recipes.path_training(BOUNDS[row].config) for row in rows)
    ]
    flow, wide = counts[2] - counts[0], counts[1] - counts[0]
    assert wide == pytest.approx(flow, rel=0.02)


@pytest.mark.usefixtures("mnist_is_read_once")
@pytest.mark.parametrize("row", ["vae", "hvae_free", "annealed_3"])
def test_a_row_is_trained_and_evaluated(row, tmp_path):
    experiment = BOUNDS[row]._replace(config=BOUNDS[row].config | SMALL)
    assert experiments.run_experiment(experiment, root=tmp_path).word == "done"
    path = results.result_path(tmp_path / "data/results", *experiment[:4])
    found = results.load_result(path)
    values = found.per_image
    assert (values["path_ll"] >= values["bound"]).all() and values["bound"].shape == (3,)
    assert values["hais_ll"].isfinite().all() and values["simulated_gap"].shape == (2,)
    assert ("acceptance" in values) == ("score_share" in found.record["details"])
    assert ("acceptance" in values) == (row == "annealed_3")


ONE_OF_EACH = ["ring_importance_5", "ring_mcd_16", "eight_gaussians_realnvp_5", "funnel_mean_field",
               "digits_uha_5", "digits_mcd_16", "inpainting_hvae_free_5"]  # fmt: skip


@pytest.mark.usefixtures("mnist_is_read_once")
@pytest.mark.parametrize("row", ONE_OF_EACH)
def test_a_path_is_fitted_to_a_target(row, tmp_path):
    small = {"num_updates": 2, "num_samples": 20, "starts": 2, "num_temperatures": 5}
    experiment = TARGETS[row]._replace(config=TARGETS[row].config | small)
    assert experiments.run_experiment(experiment, root=tmp_path).word == "done"
    path = results.result_path(tmp_path / "data/results", *experiment[:4])
    values = results.load_result(path).per_image
    assert values["gap"].shape == (2,) and values["gap"].isfinite().all()
    assert (values["importance_weighted_gap"] <= values["gap"] + 1e-4).all()
    assert ("coverage" in values) == row.startswith(("ring", "eight"))


RINGS = {e.row: e for e in STUDIES["ring_learning"] if e.seed == 0}


@pytest.mark.parametrize("row", ["exact_2", "mean_field_10", "importance_2", "annealed_10"])
def test_the_parameters_of_a_ring_are_learned(row, tmp_path):
    small = {"num_observations": 50, "batch_size": 20, "num_judged": 4, "num_samples": 3}
    small |= {"num_updates": 1, "learning_rate": 1e-9}
    experiment = RINGS[row]._replace(config=RINGS[row].config | small)
    assert experiments.run_experiment(experiment, root=tmp_path).word == "done"
    found = results.load_result(results.result_path(tmp_path / "data/results", *experiment[:4]))
    details, values = found.record["details"], found.per_image
    start = math.exp(2.0)  # from which nothing has moved
    assert details["squared_error_alpha"] == pytest.approx((start - 2 * math.pi) ** 2, rel=1e-5)
    assert details["squared_error_beta"] == pytest.approx((start - 2) ** 2, rel=1e-5)
    assert values["loss"].shape == (4,) and values["loss"].mean() > 0
    assert (values["gap"].abs().max() < 1e-4) == (row == "exact_2")


def test_the_exact_row_of_a_ring_learns_and_all_rows_have_the_same_data():
    few = {"num_observations": 2000, "num_updates": 150, "learning_rate": 0.1}
    configs = [RINGS[row].config | few for row in ("exact_2", "importance_2")]
    configs[1] |= {"num_updates": 1, "learning_rate": 1e-9}
    exact, still = (recipes.evaluate_ring(Run(0, c, None, None, None)) for c in configs)
    assert exact.details["squared_error_alpha"] < 0.1 > exact.details["squared_error_beta"]
    assert exact.per_image["loss"].mean().abs() < 0.1
    assert still.per_image["loss"].mean() > 50 * exact.per_image["loss"].mean()


def test_a_path_whose_weights_are_beyond_the_numbers_has_diverged():
    def wild(model, q, x, num_samples):
        weights = 1e25 * torch.randn(num_samples, len(x))
        z = q.sample((num_samples,))
        return Path(weights, z, torch.zeros_like(weights), torch.zeros(0, num_samples, len(x)))

    encoder, x = targets.FreeGaussian(torch.zeros(1, 2)), torch.zeros(4, 1)
    with pytest.raises(FloatingPointError, match=r"diverged: log-weights as large as \de\+25"):
        chain_bounds._judged(wild, targets.Ring(2), encoder, x, torch.zeros(4), num_samples=20)


def test_options_that_do_not_go_together_are_refused():
    for change in ({"tempering": "free"}, {"acceptance": "barker"}, {"kept_momentum": 0.5}):
        config = BOUNDS["langevin_5"].config | change
        with pytest.raises(ValueError, match=f"{next(iter(change))} = .* does not go with path"):
            PathVaeOptions.model_validate(config)


def test_normalisers_of_the_targets():
    axis = torch.linspace(-8, 8, 801).double()
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    for name, known in (("eight_gaussians", 0.0), ("ring", -3.132843)):
        model, x = targets.TARGETS[name](), torch.full((1, 1), 25.132741228718345).double()
        with torch.no_grad():
            log_joint = model.log_joint(x, plane).reshape(plane.shape[:-1])
            found = log_joint.logsumexp((0, 1)) + 2 * (axis[1] - axis[0]).log()
            assert found.item() == pytest.approx(known, abs=1e-4)
            assert model.log_evidence(x).item() == pytest.approx(known, abs=1e-4)
    z = 3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    neck = torch.stack([z, torch.zeros_like(z)], -1)
    log_p = targets.funnel().log_joint(None, neck)  # the second integrates to 1 for each first
    width = (0.5 * z).exp() * (2 * torch.pi) ** 0.5
    weight = log_p.exp() * width / torch.distributions.Normal(0.0, 3.0).log_prob(z).exp()
    assert weight.mean().item() == pytest.approx(1.0, abs=0.01)


def test_coverage_counts_directions():
    centres = targets.mode_centres(8)
    z = torch.cat([centres[:3].repeat(4, 1), centres[5:6]])[:, None]
    assert targets.circular_coverage(z, 8).item() == 0.5  # 4, 4, 4 and 1 of 13 points
