"""One decoder, many teachers: what rows share, what they differ in, and what is compared."""

import pytest
import torch

from amortised import data, evaluation, experiments, recipes, results, runs
from amortised.studies import TeacherOptions, load_studies

STUDY = load_studies()["many_teachers"]
ROWS = {experiment.row: experiment for experiment in STUDY if experiment.seed == 0}
TINY = {
    "training_images": 20,
    "batch_size": 10,
    "images": 3,
    "num_chains": 2,
    "pilot_chains": 1,
    "num_temperatures": 3,
    "simulated_pairs": 2,
}


def tiny(row, **changes):
    config = ROWS[row].config | TINY
    config["num_steps"] = min(config["num_steps"], 2)
    return ROWS[row]._replace(config=config | changes)


def test_rows_differ_by_their_teacher_alone_and_share_images_and_updates():
    names = {"method", "kernel", "num_steps", "step_size"}
    shared = [{k: v for k, v in e.config.items() if k not in names} for e in STUDY]
    assert all(config == shared[0] for config in shared) and len(STUDY) == 18
    assert "trained" not in shared[0] and len({e.row for e in STUDY}) == 6


@pytest.mark.parametrize("row", ROWS)
def test_a_row_goes_on_from_the_weights_and_learns(row):
    config = tiny(row).config
    torch.manual_seed(0)
    training = recipes.teacher_training(config)
    for role in ("decoder", "encoder"):
        path = data.data_folder() / f"models/{config['start']}-{role}.safetensors"
        before = evaluation.load_module(path).state_dict()
        for name, value in training.networks[role].state_dict().items():
            assert torch.equal(value, before[name])
    losses = training.step(torch.bernoulli(torch.full((10, 784), 0.2)), torch.arange(10))
    noted = [f"log_likelihood_{who}" for who in ("student", "other", "teacher")]
    assert list(losses) == (["loss"] if row == "vae" else ["model", "encoder", *noted])
    for optimizer in training.optimizers.values():
        (group,) = optimizer.param_groups
        assert group["lr"] == config["learning_rate"] and group["betas"] == (0.9, 0.999)


def test_images_are_random_and_differences_paired(tmp_path):
    experiment = tiny("mala_t5", learning_rate=0.0)  # nothing moves
    state = experiments.run_experiment(experiment, root=tmp_path)
    path = results.result_path(tmp_path / "data/results", *experiment[:4])
    values = results.load_result(path).per_image
    assert state.word == "done" and (values["hais_ll_change"] == 0).all()
    assert values["hais_ll"].shape == (3,) and values["simulated_gap"].shape == (2,)
    rate = values["teacher_acceptance_rate"]
    assert ((rate >= 0) & (rate <= 1)).all()

    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(2017))
    x = data.load_mnist_binary("test").images[order[:3]]
    folder = experiments.run_folder(experiment, tmp_path)
    decoder = evaluation.load_module(folder / "decoder.safetensors")
    decoder = decoder.to(memory_format=torch.channels_last)
    settings = {"num_chains": 2, "pilot_chains": 1, "num_temperatures": 3, "num_leapfrog": 1}
    again = evaluation.hais_ll(decoder, x, persistence=0.9, seed=0, **settings)
    assert torch.equal(again.log_likelihood.float(), values["hais_ll"])
    assert runs.read_json(folder / "training.json")["steps"] == 2


def test_other_weights_and_half_a_chain_are_refused():
    with pytest.raises(ValueError, match=r"start_sha256 is 0{64}, that of .* 530dd8eb"):
        recipes.teacher_training(ROWS["vae"].config | {"start_sha256": 64 * "0"})
    config = ROWS["vae"].config | {"kernel": "mala"}
    with pytest.raises(ValueError, match=r"kernel = 'mala', num_steps = 0 .* do not go together"):
        TeacherOptions.model_validate(config)
