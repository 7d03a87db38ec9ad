"""Diagnostics of students, on a model with an exact teacher: four students are told apart."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from amortised.adversarial import Discriminator
from amortised.diagnostics import classifier_auc, moment_errors, student_diagnostics
from amortised.models import LinearGaussian

NUM_IMAGES, NUM_SAMPLES = 100, 64


def model_with_diagonal_posteriors():
    """Three latents of posterior standard deviations 0.196, 0.447 and 0.707, two seen well."""
    weight = torch.zeros(5, 3)
    weight[0, 0], weight[1, 1], weight[2, 2] = 5.0, 2.0, 1.0
    return LinearGaussian(weight, torch.randn(5), 1.0)


MODEL = model_with_diagonal_posteriors()


def exact(x, z):
    return MODEL.posterior(x).sample((len(z),))


def mean_and_error(values):
    return values.mean(), values.std() / math.sqrt(len(values))


def student(kind):
    def encoder(x):
        posterior = MODEL.posterior(x)
        mean, scale = posterior.mean.detach(), posterior.variance.sqrt().detach()
        if kind == "ignores x":
            return Independent(Normal(torch.zeros_like(mean), torch.ones_like(scale)), 1)
        if kind == "another scale":
            return Independent(Normal(2.0 * mean, 2.0 * scale), 1)
        return Independent(Normal(mean, 0.5 * scale if kind == "half as wide" else scale), 1)

    return encoder


@pytest.mark.parametrize("kind", ["matches", "half as wide", "another scale", "ignores x"])
def test_four_students_are_told_apart(kind):
    x, _ = MODEL.sample(NUM_IMAGES)
    found = student_diagnostics(
        MODEL, student(kind), x, teacher=exact, long_chain=exact, num_samples=NUM_SAMPLES
    )
    classifier = Discriminator(6, nn.Linear(5, 16), 16, 64)
    x_fit, _ = MODEL.sample(500)
    auc = classifier_auc(classifier, student(kind), x_fit, x, teacher=exact, epochs=5)

    with torch.no_grad():
        posterior, q = MODEL.posterior(x), student(kind)(x)
        squared = ((q.mean - posterior.mean).square() / posterior.variance).mean(-1)
        ratio = (q.variance / posterior.variance).log().mean(-1)
    known = {  # the reference's variance is estimated, hence the factor
        "student_squared_mean_error": squared * (NUM_SAMPLES - 1) / (NUM_SAMPLES - 3),
        "student_log_variance_ratio": ratio,
        "teacher_squared_mean_error": torch.zeros(NUM_IMAGES),
        "teacher_log_variance_ratio": torch.zeros(NUM_IMAGES),
    }
    for name, values in known.items():
        difference, error = mean_and_error(found[name] - values)
        assert difference.abs() < 4 * error, name

    own, other, teacher = (
        found[f"log_likelihood_{name}"] for name in ("student", "other", "teacher")
    )
    reads_x, error = mean_and_error(own - other)
    assert (reads_x > 4 * error) == (kind != "ignores x")
    gap, error = mean_and_error(own - teacher)
    auc, auc_error = mean_and_error(auc)
    if kind == "matches":
        assert gap.abs() < 4 * error and (auc - 0.5).abs() < 4 * auc_error
        return
    assert auc - 4 * auc_error > 0.7
    assert (gap > 4 * error) == (kind == "half as wide")  # which its log-likelihood praises
    assert (found["student_log_variance_ratio"].mean() > 0) == (kind != "half as wide")


def test_moments_of_a_chain_that_goes_on_are_compared_in_pairs():
    """The k-th reference may be made from the k-th sample: what they share is no noise."""
    z = torch.randn(16, 4000, 2)
    shift = torch.tensor([0.3, -0.5])
    squared, ratio = moment_errors(z + shift, z)
    expected = (shift.square() / z.var(0)).mean(-1)
    torch.testing.assert_close(squared, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ratio, torch.zeros(4000), atol=1e-5, rtol=0)
    squared, ratio = moment_errors(torch.randn(16, 4000, 2), 2 * z)
    assert abs(squared.mean()) < 4 * squared.std() / math.sqrt(4000) + 2 / 16 / 13
    assert abs(ratio.mean() + 2 * math.log(2)) < 4 * ratio.std() / math.sqrt(4000)


def test_what_cannot_be_compared_is_refused():
    x = torch.zeros(3, 5)
    settings = {"teacher": exact, "long_chain": lambda x, z: z[:7]}
    with pytest.raises(ValueError, match=r"shapes \(8, 3, 3\) and \(7, 3, 3\)"):
        student_diagnostics(MODEL, student("matches"), x, num_samples=8, **settings)
    with pytest.raises(ValueError, match=r"num_samples .* at least 4; got 3"):
        student_diagnostics(MODEL, student("matches"), x, num_samples=3, **settings)
    with pytest.raises(ValueError, match=r"num_observations .* at least 2; got 1"):
        student_diagnostics(MODEL, student("matches"), x[:1], **settings)
