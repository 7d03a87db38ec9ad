r"""What a student has learned: does it read its image, is it where its teacher is, and as wide?

The losses of a game do not tell. A discriminator at :math:`2 \log 2` may be blind, and
:math:`\log p(x \mid z_0)` is high for a student that has collapsed onto the mode. So three things
are measured, each against draws of the teacher: the log-likelihood beside that of another image's
draws, the first two moments, and how well a classifier that is fitted afterwards tells the two
apart on images that it has not seen.
"""

import torch
from torch import Tensor, nn

from .adversarial import adaptive_contrast, discriminator_loss, standardised_features
from .amc import Encoder, Teacher, student_samples
from .models import LatentVariableModel, as_model
from .numerics import check_counts
from .training import fit, gradient_step, half_cosine


@torch.no_grad()
def student_diagnostics(
    model: LatentVariableModel,
    encoder: Encoder,
    x: Tensor,
    *,
    teacher: Teacher,
    long_chain: Teacher,
    num_samples: int = 64,
) -> dict[str, Tensor]:
    r"""A student held to its teacher, and the teacher to a longer chain, at each observation.

    :param model: p(x, z).
    :param encoder: the student.
    :param x: observations, ``[B, P]``, at least two: the "other image" is the one before.
    :param teacher: maps x and :math:`z_0`, ``[K, B, D]``, to as many samples :math:`z_T`.
    :param long_chain: goes on from :math:`z_T` in the same way, for many more steps.
    :param num_samples: K draws of the student for each observation, at least 4.
    :return: values ``[B]`` by name. ``log_likelihood_student``, ``log_likelihood_other`` and
        ``log_likelihood_teacher`` are means of :math:`\log p(x \mid z)` at :math:`z_0`, at
        :math:`z_0` of another image and at :math:`z_T`, in nats; a student that ignores x has the
        first two alike. ``student_squared_mean_error`` and ``student_log_variance_ratio`` are the
        :func:`moment_errors` of student against teacher, and ``teacher_...`` those of the teacher
        against the longer chain.
    :raises ValueError: for fewer observations or samples, or another number from a teacher.

    >>> from amortised.models import LinearGaussian
    >>> model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.randn(5, 1)
    >>> def exact(x, z): return model.posterior(x).sample((len(z),))
    >>> found = student_diagnostics(model, model.posterior, x, teacher=exact, long_chain=exact)
    >>> bool(found["student_log_variance_ratio"].abs().max() < 1)
    True
    """
    check_counts(minimum=4, num_samples=num_samples)
    check_counts(minimum=2, num_observations=len(x))
    model = as_model(model)
    z_student = student_samples(encoder, x, num_samples)
    z_teacher = teacher(x, z_student)
    z_long = long_chain(x, z_teacher)
    found = {
        "log_likelihood_student": model.log_likelihood(x, z_student).mean(0),
        "log_likelihood_other": model.log_likelihood(x, z_student.roll(1, dims=1)).mean(0),
        "log_likelihood_teacher": model.log_likelihood(x, z_teacher).mean(0),
    }
    for name, z, reference in (
        ("student", z_student, z_teacher),
        ("teacher", z_teacher, z_long),
    ):
        errors = moment_errors(z, reference)
        found[f"{name}_squared_mean_error"], found[f"{name}_log_variance_ratio"] = errors
    return found


def moment_errors(z: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    r"""Squared error of the means, in standard deviations of the reference; log ratio of variances.

    .. math:: \frac1D \sum_d \frac{(\bar z_d - \bar r_d)^2 - v_d / K}{\mathrm{Var}[r_d]}, \qquad
        \frac1D \sum_d \log \frac{\mathrm{Var}[z_d]}{\mathrm{Var}[r_d]}

    The sampling noise is removed: :math:`v_d` is the variance of the difference
    :math:`z_{kd} - r_{kd}`, so that the k-th reference may have been made from the k-th sample, and
    a single value may be negative. Average over observations, then take the root. The ratio to an
    estimated variance makes the first a factor :math:`(K - 1) / (K - 3)` too large.

    :param z: samples, ``[K, B, D]``.
    :param reference: as many samples of the law to compare with.
    :return: both ``[B]``.
    :raises ValueError: when the shapes differ.

    >>> z = torch.tensor([-1.0, 1.0, -1.0, 1.0]).reshape(4, 1, 1)
    >>> moment_errors(2.0 * z + 3.0, z)  # (9 - 4/3 / 4) / (4/3), log 4
    (tensor([6.5000]), tensor([1.3863]))
    """
    if z.shape != reference.shape:
        raise ValueError(
            "moments are compared of as many samples; got shapes "
            f"{tuple(z.shape)} and {tuple(reference.shape)}"
        )
    variance = reference.var(0)
    noise = (z - reference).var(0) / len(z)
    error = ((z.mean(0) - reference.mean(0)).square() - noise) / variance
    return error.mean(-1), (z.var(0) / variance).log().mean(-1)


# --- a classifier afterwards ---------------------------------------------------------------------


def classifier_auc(
    classifier: nn.Module,
    encoder: Encoder,
    x_fit: Tensor,
    x: Tensor,
    *,
    teacher: Teacher,
    num_samples: int = 64,
    epochs: int = 20,
    learning_rate: float = 1e-3,
) -> Tensor:
    r"""How well a fresh classifier tells student from teacher, on observations it has not seen.

    It is fitted by logistic regression, Adam along half a cosine, batches of 50, and sees x and
    :func:`amortised.adversarial.standardised_features` of z in the student's moments at x.

    :param classifier: untrained, ``(x [B, P], features [K, B, 2 D]) -> [K, B]``, such as
        ``Discriminator(2 * latent_dim)``; changed in place.
    :param encoder: the student.
    :param x_fit: observations to fit it on, ``[N, P]``.
    :param x: others, ``[B, P]``, to judge it on.
    :param teacher: maps x and samples of the student, ``[K, B, D]``, to samples of the teacher.
    :param num_samples: K for each observation, of student, teacher, and for the moments.
    :param epochs: passes over ``x_fit``.
    :return: the :func:`area_under_curve` at each observation, ``[B]``: 0.5 where it cannot tell.

    Source: classifier two-sample tests, Lopez-Paz and Oquab (2017).
    """
    z_teacher, z_student = _in_student_coordinates(encoder, x_fit, teacher, num_samples)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate)

    def loss_fn(index: Tensor) -> Tensor:
        pair = z_teacher[:, index], z_student[:, index]
        return discriminator_loss(classifier, x_fit[index], *pair)

    fit(
        gradient_step(loss_fn, optimizer),
        torch.arange(len(x_fit), device=x_fit.device),
        {"classifier": classifier, "optimizer": optimizer},
        epochs=epochs,
        batch_size=min(50, len(x_fit)),
        schedule=half_cosine,
    )
    with torch.no_grad():
        z_teacher, z_student = _in_student_coordinates(encoder, x, teacher, num_samples)
        return area_under_curve(classifier(x, z_teacher), classifier(x, z_student))


def area_under_curve(above: Tensor, below: Tensor) -> Tensor:
    """Share of the pairs in which the first scores higher; ties count one half.

    :param above: scores ``[M, ...]``.
    :param below: scores ``[K, ...]``.
    :return: ``[...]``, between 0 and 1.

    >>> area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 4.0]))
    tensor(0.5625)
    """
    difference = above.unsqueeze(1) - below
    return 0.5 * (difference.sign() + 1.0).mean((0, 1))


@torch.no_grad()
def _in_student_coordinates(
    encoder: Encoder, x: Tensor, teacher: Teacher, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Features of teacher and student, the teacher started from other draws."""
    z_student, start, z_moments = student_samples(encoder, x, 3 * num_samples).chunk(3)
    contrast = adaptive_contrast(z_moments)
    pair = teacher(x, start), z_student
    return tuple(standardised_features(z, contrast) for z in pair)
