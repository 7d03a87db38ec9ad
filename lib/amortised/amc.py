r"""Amortised MCMC: student, T steps of a Markov chain, teacher, distil; and its baselines.

For each minibatch the student proposes :math:`z_0 \sim q_\phi(z \mid x)`; a chain that targets the
posterior improves it to :math:`z_T`, a sample of the teacher :math:`q_T`; the decoder learns from
:math:`z_T`; and the student is pulled towards the teacher by a distillation rule. Each baseline is
the same few lines with a part taken out:

=======================  ==============  =======================  =====================
step                     z for decoder   what the student learns  chain
=======================  ==============  =======================  =====================
:func:`vae_step`         :math:`z_0`     ELBO                     none
:func:`mcmc_vi_step`     :math:`z_T`     ELBO                     from :math:`z_0`
:func:`amc_step`         :math:`z_T`     the teacher              from :math:`z_0`
:func:`avb_step`         :math:`z_0`     ELBO, by a game          none
:func:`persistent_step`  :math:`z_T`     there is none            from the last visit
=======================  ==============  =======================  =====================

A step makes one update of each optimiser and returns its losses, as ``training.fit`` wants; bind
the rest of its arguments, and draw the binary images, in a lambda::

    teacher = partial(teacher_samples, model, num_steps=50, step_size=0.02)
    step = lambda grey: amc_step(
        binarise(grey), model, encoder, optimizers, teacher=teacher, discriminator=discriminator
    )

Optimisers come as a dictionary with the names ``"model"``, ``"encoder"``, ``"discriminator"``;
leave out ``"model"`` to keep the decoder as it is. A loss changes the parameters of its own
optimisers and no other.

Source: Li, Turner and Liu (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from . import adversarial
from .encoders import ImplicitEncoder
from .mcmc import SampledChain, ValueAndGrad, langevin_step, sample_chain
from .models import LatentVariableModel
from .numerics import all_finite
from .objectives import elbo

__all__ = [
    "RULES",
    "PersistentChains",
    "amc_step",
    "avb_step",
    "descend",
    "mcmc_vi_step",
    "persistent_step",
    "student_samples",
    "teacher_chain",
    "teacher_samples",
    "vae_step",
]

RULES = ("gan", "wasserstein", "mmd", "inclusive_kl")
"""Distillation rules of :func:`amc_step`."""

Encoder = Callable[[Tensor], Distribution] | ImplicitEncoder
Teacher = Callable[[Tensor, Tensor], Tensor]


# --- student and teacher -------------------------------------------------------------------------


def student_samples(encoder: Encoder, x: Tensor, num_samples: int = 1) -> Tensor:
    r"""Samples :math:`z_0 \sim q_\phi(z \mid x)` of an encoder with or without a density.

    :param encoder: an :class:`amortised.encoders.ImplicitEncoder`, or a callable from ``[B, P]`` to
        a distribution.
    :param x: observations, ``[B, P]``.
    :param num_samples: K.
    :return: ``[K, B, D]``, with its graph where the draw is reparameterised.
    :raises TypeError: when the encoder is neither.

    >>> from amortised.encoders import GaussianEncoder
    >>> encoder = GaussianEncoder(2, trunk=nn.Identity(), num_features=3)
    >>> student_samples(encoder, torch.zeros(5, 3), num_samples=7).shape
    torch.Size([7, 5, 2])
    """
    if isinstance(encoder, ImplicitEncoder):
        return encoder(x, num_samples)
    return _draw(_distribution(encoder, x), num_samples)


def _draw(q: Distribution, num_samples: int) -> Tensor:
    """Reparameterised where possible; ``Normal.sample`` reads values, as no CUDA graph may."""
    return (q.rsample if q.has_rsample else q.sample)((num_samples,))


def _distribution(encoder: Encoder, x: Tensor) -> Distribution:
    q = encoder(x)
    if not isinstance(q, Distribution):
        raise TypeError(
            f"a density is needed: the encoder must return a distribution, not a {type(q).__name__}"
            " (only an ImplicitEncoder may return samples, for rules without a density)"
        )
    return q


def teacher_chain(
    model: LatentVariableModel,
    x: Tensor,
    z0: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    kernel: Callable = langevin_step,
    thin: int = 1,
    route: Callable[[Tensor], ValueAndGrad] | None = None,
    generator: torch.Generator | None = None,
) -> SampledChain:
    r"""T steps of a chain on :math:`\log p_\theta(x, \cdot)` from the student's samples.

    :param model: the model; its parameters get no gradient.
    :param x: observations, ``[B, P]``.
    :param z0: samples of the student, ``[K, B, D]``; the graph is cut.
    :param num_steps: T.
    :param step_size: as the kernel means it: for :func:`amortised.mcmc.langevin_step` drift
        ``step_size / 2`` times the gradient and noise ``sqrt(step_size)``.
    :param kernel: ``langevin_step`` (no Metropolis test, as in the source), ``mala_step``, or
        ``partial(hmc_step, num_steps=L)`` of :mod:`amortised.mcmc`.
    :param thin: keep one position in ``thin``.
    :param route: a faster way to the likelihood: maps x to a callable
        ``z -> (log-likelihood [K, B], gradient [K, B, D])``. By default the model and autograd.
    :param generator: source of the chain's randomness; the global stream when None.
    :return: positions after the steps, ``[T // thin, K, B, D]``, without the start; and the mean
        acceptance probability ``[K, B]``, None for the unadjusted kernel.
    :raises FloatingPointError: when a position is not finite. Nothing is ever clipped.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> z0, generator = torch.zeros(3, 5, 1), torch.Generator().manual_seed(0)
    >>> chain = teacher_chain(
    ...     model, torch.ones(5, 1), z0, num_steps=4, step_size=0.1, generator=generator
    ... )
    >>> chain.samples.shape, chain.acceptance_rate
    (torch.Size([4, 3, 5, 1]), None)
    """
    _check_finite(z0, "the student's samples")
    if route is None:
        logdensity_fn = partial(model.log_joint, x)
    else:
        likelihood, log_prior_fn = route(x), model.prior().log_prob

        def logdensity_fn(z: Tensor) -> Tensor:
            return log_prior_fn(z) + _GivenGradient.apply(z, likelihood)

    def step(state):
        return kernel(state, logdensity_fn, step_size, generator=generator)

    if num_steps < thin:
        raise ValueError(f"num_steps must be at least 1, and at least thin={thin}; got {num_steps}")
    chain = sample_chain(step, z0.detach(), num_steps // thin, thin=thin)
    _check_finite(chain.samples, "the chain's positions")
    return chain


def teacher_samples(
    model: LatentVariableModel, x: Tensor, z0: Tensor, *, num_steps: int, **settings
) -> Tensor:
    r"""Samples :math:`z_T \sim q_T(z \mid x)` of the teacher: the end of :func:`teacher_chain`.

    :param num_steps: T.
    :param settings: the other settings of :func:`teacher_chain`, ``step_size`` among them.
    :return: ``[K, B, D]``, without graph; other arguments and errors as there.

    >>> from amortised.mcmc import mala_step
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.0]]), torch.Generator().manual_seed(0)
    >>> z = teacher_samples(model, x, torch.zeros(4000, 1, 1), num_steps=20, step_size=0.5,
    ...                     kernel=mala_step, generator=generator)
    >>> (z.mean(0) - model.posterior(x).mean).abs() < 0.05
    tensor([[True]])
    """
    return teacher_chain(model, x, z0, num_steps=num_steps, thin=num_steps, **settings).samples[-1]


class _GivenGradient(torch.autograd.Function):
    """A function of z whose gradient is computed with its value, as autograd sees it."""

    @staticmethod
    def forward(ctx, z: Tensor, value_and_grad_fn: ValueAndGrad) -> Tensor:
        value, grad = value_and_grad_fn(z.detach())
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad_output.unsqueeze(-1) * grad, None


class PersistentChains(nn.Module):
    r"""K chains for each of N training images, kept from one visit to the next.

    This is what amortisation saves: N K D numbers, and no samples for an image never seen. The
    table is a buffer, so that it moves with ``.to(device)`` and ``training.fit`` keeps it in its
    checkpoints when it is named in ``state``. It starts at :math:`\mathcal{N}(0, I)`, drawn from
    the global stream (an assumption: the source does not say).

    :param num_data: N.
    :param latent_dim: D.
    :param num_chains: K.
    :raises ValueError: when a number is less than 1.

    >>> chains = PersistentChains(num_data=60_000, latent_dim=32)
    >>> chains.num_bytes, chains(torch.tensor([3, 5])).shape
    (7680000, torch.Size([1, 2, 32]))
    """

    def __init__(self, num_data: int, latent_dim: int, num_chains: int = 1):
        super().__init__()
        if min(num_data, latent_dim, num_chains) < 1:
            raise ValueError(
                "num_data, latent_dim and num_chains must be at least 1; got "
                f"{num_data}, {latent_dim} and {num_chains}"
            )
        self.register_buffer("z", torch.randn(num_chains, num_data, latent_dim))

    @property
    def num_bytes(self) -> int:
        """Memory of the table, in bytes."""
        return self.z.numel() * self.z.element_size()

    def forward(self, index: Tensor) -> Tensor:
        """Where the chains of the images ``index`` ``[B]`` are now, ``[K, B, D]``."""
        return self.z[:, index]

    def store(self, index: Tensor, z: Tensor) -> None:
        """Leave the chains of the images ``index`` ``[B]`` at z, ``[K, B, D]``."""
        self.z[:, index] = z


# --- training steps ------------------------------------------------------------------------------


def descend(loss: Tensor, *optimizers: Optimizer) -> Tensor:
    """One gradient step on the mean of a loss, in the parameters of these optimisers only.

    The gradient is computed for those parameters and no other: what else the loss depends on, a
    decoder or a discriminator, is held fixed and keeps the gradient it has.

    :param loss: one value for each example, any shape.
    :return: the mean, without graph.

    >>> theta, psi = (torch.ones(1, requires_grad=True) for _ in range(2))
    >>> descend(theta * psi, torch.optim.SGD([theta], lr=0.5)), theta.item(), psi.grad
    (tensor(1.), 0.5, None)
    """
    loss = loss.mean()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    loss.backward(inputs=[p for group in groups for p in group["params"] if p.requires_grad])
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def amc_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: Encoder,
    optimizers: Mapping[str, Optimizer],
    *,
    teacher: Teacher,
    rule: str = "gan",
    discriminator: Callable[[Tensor, Tensor], Tensor] | None = None,
    decoder_samples: str = "teacher",
    num_samples: int = 1,
    num_critic_steps: int = 1,
    penalty_weight: float = 10.0,
) -> dict[str, Tensor]:
    r"""One training step of amortised MCMC.

    1. Propose :math:`z_0 \sim q_\phi(z \mid x)` and improve it to :math:`z_T`.
    2. The decoder ascends :math:`\log p_\theta(x, z_T)`.
    3. The student descends the distance to the teacher that the rule names:

       - ``"gan"``: a step of :func:`amortised.adversarial.discriminator_loss`, then
         :func:`amortised.adversarial.generator_loss`;
       - ``"wasserstein"``: a step of :func:`amortised.adversarial.critic_loss`, then
         :func:`amortised.adversarial.critic_student_loss`;
       - ``"mmd"``: :func:`amortised.adversarial.mmd_squared`, at least 8 samples;
       - ``"inclusive_kl"``: :math:`-\mathbb{E}_{q_T} \log q_\phi(z \mid x)`, if q has a density.

    :param x: observations, ``[B, P]``; binary images are drawn anew before each call.
    :param model: the decoder.
    :param encoder: the student.
    :param optimizers: for ``"encoder"``; for ``"discriminator"`` in a game; for ``"model"`` unless
        the decoder is fixed.
    :param teacher: maps x and :math:`z_0` to samples ``[M, B, D]`` without graph, usually
        ``partial(teacher_samples, model, ...)``. To learn from the whole path return
        ``teacher_chain(...).samples.flatten(0, 1)``.
    :param rule: one of :data:`RULES`.
    :param discriminator: D(x, z) of a game, or its critic.
    :param decoder_samples: whose z trains the decoder, ``"teacher"`` or ``"student"``.
    :param num_samples: K samples of the student for each observation.
    :param num_critic_steps: steps of the discriminator on these samples.
    :param penalty_weight: weight of the gradient penalty.
    :return: the mean losses ``"model"``, ``"discriminator"`` and ``"encoder"``, those that apply.
    :raises ValueError: for unknown names, or a discriminator that is missing or not used.
    :raises TypeError: when the rule needs a density, or a gradient through z, that q has not.

    Source: Li, Turner and Liu (2017); the order of the updates is an assumption.

    >>> from amortised.encoders import GaussianEncoder
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> encoder = GaussianEncoder(1, nn.Identity(), num_features=1)
    >>> losses = amc_step(
    ...     torch.ones(5, 1), model, encoder, {"encoder": torch.optim.Adam(encoder.parameters())},
    ...     teacher=lambda x, z0: model.posterior(x).sample(z0.shape[:1]), rule="inclusive_kl",
    ... )
    >>> list(losses)
    ['encoder']
    """
    is_game = rule in ("gan", "wasserstein")
    _check_choice("rule", rule, RULES)
    _check_choice("decoder_samples", decoder_samples, ("teacher", "student"))
    _check_optimizers(optimizers, {"encoder"} | ({"discriminator"} if is_game else set()))
    if is_game != (discriminator is not None):
        raise ValueError(f"rule {rule!r} {'needs a' if is_game else 'has no'} discriminator")

    if rule == "inclusive_kl":
        q = _distribution(encoder, x)
        z_student = _draw(q, num_samples).detach()
    else:
        z_student = student_samples(encoder, x, num_samples)
        if not z_student.requires_grad:
            raise TypeError(f"rule {rule!r} needs a student whose samples have a gradient")
    z_teacher = teacher(x, z_student.detach())
    losses = {}

    if "model" in optimizers:
        z = z_teacher if decoder_samples == "teacher" else z_student.detach()
        losses["model"] = descend(-model.log_joint(x, z), optimizers["model"])

    for _ in range(num_critic_steps if is_game else 0):
        if rule == "gan":
            loss = adversarial.discriminator_loss(discriminator, x, z_teacher, z_student)
        else:
            loss = adversarial.critic_loss(discriminator, x, z_teacher, z_student, penalty_weight)
        losses["discriminator"] = descend(loss, optimizers["discriminator"])

    if rule == "gan":
        loss = adversarial.generator_loss(discriminator, x, z_student)
    elif rule == "wasserstein":
        loss = adversarial.critic_student_loss(discriminator, x, z_student)
    elif rule == "mmd":
        loss = adversarial.mmd_squared(z_student, z_teacher)
    else:
        loss = -q.log_prob(z_teacher)
    losses["encoder"] = descend(loss, optimizers["encoder"])
    return losses


def vae_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: Callable[[Tensor], Distribution],
    optimizers: Mapping[str, Optimizer],
    *,
    num_samples: int = 1,
) -> dict[str, Tensor]:
    """No chain: student and decoder ascend the ELBO together, its divergence in closed form.

    :return: the mean of the negative ELBO, ``"loss"``; arguments as in :func:`amc_step`.
    :raises TypeError: when q has no density.

    >>> from amortised.encoders import GaussianEncoder
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> encoder = GaussianEncoder(1, nn.Identity(), num_features=1)
    >>> optimizers = {"encoder": torch.optim.Adam(encoder.parameters())}
    >>> list(vae_step(torch.ones(5, 1), model, encoder, optimizers))
    ['loss']
    """
    _check_optimizers(optimizers, {"encoder"})
    loss = -elbo(model, _distribution(encoder, x), x, num_samples, analytic_kl=True)
    return {"loss": descend(loss, *optimizers.values())}


def mcmc_vi_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: Callable[[Tensor], Distribution],
    optimizers: Mapping[str, Optimizer],
    *,
    teacher: Teacher,
    num_samples: int = 1,
) -> dict[str, Tensor]:
    r"""MCMC-corrected VI: the decoder learns from :math:`z_T`, the student from the ELBO alone.

    Nothing pulls the student towards the teacher, so samples at test time still need the chain.

    :return: the mean losses ``"model"`` and ``"encoder"``; arguments as in :func:`amc_step`.
    :raises TypeError: when q has no density.

    Source: de Freitas et al. (2001); Hoffman (2017).

    >>> from amortised.encoders import GaussianEncoder
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> encoder = GaussianEncoder(1, nn.Identity(), num_features=1)
    >>> optimizers = {"model": torch.optim.Adam(model.parameters()),
    ...               "encoder": torch.optim.Adam(encoder.parameters())}
    >>> teacher = partial(teacher_samples, model, num_steps=5, step_size=0.2)
    >>> list(mcmc_vi_step(torch.ones(5, 1), model, encoder, optimizers, teacher=teacher))
    ['model', 'encoder']
    """
    _check_optimizers(optimizers, {"encoder"})
    q, losses = _distribution(encoder, x), {}
    if "model" in optimizers:
        z_teacher = teacher(x, _draw(q, num_samples).detach())
        losses["model"] = descend(-model.log_joint(x, z_teacher), optimizers["model"])
    loss = -elbo(model, q, x, num_samples, analytic_kl=True)
    losses["encoder"] = descend(loss, optimizers["encoder"])
    return losses


def avb_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: Encoder,
    optimizers: Mapping[str, Optimizer],
    *,
    discriminator: Callable[[Tensor, Tensor], Tensor],
    num_samples: int = 1,
    contrast: bool = False,
) -> dict[str, Tensor]:
    """Adversarial variational Bayes: no chain, and the ELBO of a student without a density.

    A step of :func:`amortised.adversarial.avb_discriminator_loss`, then student and decoder descend
    :func:`amortised.adversarial.avb_loss` together.

    :param contrast: compare with the student's own moments
        (:func:`amortised.adversarial.adaptive_contrast`) instead of the prior; needs
        ``num_samples`` of some tens.
    :return: the mean losses ``"discriminator"`` and ``"loss"``; other arguments as in
        :func:`amc_step`.

    Source: Mescheder, Nowozin and Geiger (2017), sections 3.2 and 3.3.

    >>> from amortised.adversarial import Discriminator
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> encoder = ImplicitEncoder(1, trunk=nn.Identity(), num_features=1, num_hidden=8)
    >>> discriminator = Discriminator(1, nn.Identity(), num_features=1, num_hidden=8)
    >>> networks = {"model": model, "encoder": encoder, "discriminator": discriminator}
    >>> optimizers = {k: torch.optim.Adam(v.parameters()) for k, v in networks.items()}
    >>> list(avb_step(torch.ones(5, 1), model, encoder, optimizers, discriminator=discriminator))
    ['discriminator', 'loss']
    """
    _check_optimizers(optimizers, {"encoder", "discriminator"})
    z = student_samples(encoder, x, num_samples)
    r = adversarial.adaptive_contrast(z) if contrast else None
    loss = adversarial.avb_discriminator_loss(discriminator, x, z, r)
    losses = {"discriminator": descend(loss, optimizers["discriminator"])}
    others = [optimizer for name, optimizer in optimizers.items() if name != "discriminator"]
    losses["loss"] = descend(adversarial.avb_loss(model, discriminator, x, z, r), *others)
    return losses


def persistent_step(
    x: Tensor,
    index: Tensor,
    model: LatentVariableModel,
    chains: PersistentChains,
    optimizers: Mapping[str, Optimizer],
    *,
    teacher: Teacher,
) -> dict[str, Tensor]:
    """No student: each image's chains go on from where its last visit left them.

    Where x is drawn anew at each visit, a stored z mixes several posteriors.

    :param x: observations, ``[B, P]``.
    :param index: which training images they are, ``[B]``; pass ``torch.arange(N)`` as the second
        tensor of the data.
    :param chains: the table; it is changed in place.
    :return: the mean loss ``"model"``; other arguments as in :func:`amc_step`.

    Source: the persistent MCMC of Li, Turner and Liu (2017).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> chains = PersistentChains(num_data=100, latent_dim=1)
    >>> optimizers = {"model": torch.optim.Adam(model.parameters())}
    >>> teacher = partial(teacher_samples, model, num_steps=5, step_size=0.2)
    >>> x, index = torch.ones(5, 1), torch.arange(5)
    >>> list(persistent_step(x, index, model, chains, optimizers, teacher=teacher))
    ['model']
    """
    _check_optimizers(optimizers, {"model"})
    z = teacher(x, chains(index))
    chains.store(index, z)
    return {"model": descend(-model.log_joint(x, z), optimizers["model"])}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_optimizers(optimizers: Mapping[str, Optimizer], required: set[str]) -> None:
    if not required <= optimizers.keys() <= required | {"model"}:
        raise ValueError(
            f"this step needs optimizers for {', '.join(sorted(required))}, and takes one for "
            f"model; got {', '.join(optimizers) or 'none'}"
        )


def _check_finite(z: Tensor, what: str) -> None:
    if not all_finite(z):
        raise FloatingPointError(
            f"{what} are not finite; use a smaller step_size or learning rate (nothing is clipped)"
        )
