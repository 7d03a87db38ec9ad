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
:func:`short_run_step`   :math:`z_T`     there is none            from the prior
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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.optim import Optimizer

from . import adversarial
from .adversarial import MIN_MMD_SAMPLES, Critic
from .encoders import ImplicitEncoder
from .mcmc import SampledChain, ValueAndGrad, langevin_step, sample_chain
from .models import LatentVariableModel, as_model, check_fixed, log_joint_fn
from .numerics import all_finite, check_counts
from .objectives import elbo

Optimizers = Mapping[str, Optimizer]
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


def _draw(q: Distribution, *shape: int) -> Tensor:
    """Reparameterised where possible; ``Normal.sample`` reads values, as no CUDA graph may."""
    return (q.rsample if q.has_rsample else q.sample)(shape)


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
    :param route: a faster way to the likelihood: maps x to a callable
        ``z -> (log-likelihood [K, B], gradient [K, B, D])``. By default the model and autograd.
    :param generator: source of the chain's randomness; the global stream when None.
    :return: positions after the steps, ``[T, K, B, D]``, without the start; and the mean
        acceptance probability ``[K, B]``, None for the unadjusted kernel.
    :raises FloatingPointError: when a position is not finite. Nothing is ever clipped.
    :raises ValueError: when a layer of the model is random: dropout or batch norm in training.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> z0, generator = torch.zeros(3, 5, 1), torch.Generator().manual_seed(0)
    >>> chain = teacher_chain(
    ...     model, torch.ones(5, 1), z0, num_steps=4, step_size=0.1, generator=generator
    ... )
    >>> chain.samples.shape, chain.acceptance_rate
    (torch.Size([4, 3, 5, 1]), None)
    """
    check_counts(num_steps=num_steps)
    check_fixed(model)
    _check_finite(z0, "the student's samples")
    logdensity_fn = partial(log_joint_fn(model), x)
    if route is not None:
        logdensity_fn = partial(_given_log_joint, as_model(model).prior().log_prob, route(x))
    step = partial(kernel, logdensity_fn=logdensity_fn, step_size=step_size, generator=generator)
    chain = sample_chain(step, z0.detach(), num_steps)
    _check_finite(chain.samples, "the chain's positions")
    return chain


def teacher_samples(model: LatentVariableModel, x: Tensor, z0: Tensor, **settings) -> Tensor:
    r"""Samples :math:`z_T \sim q_T(z \mid x)` of the teacher: the end of :func:`teacher_chain`.

    :param settings: ``num_steps``, ``step_size`` and the other settings of :func:`teacher_chain`.
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
    return teacher_chain(model, x, z0, **settings).samples[-1]


def _given_log_joint(log_prior_fn: Callable, likelihood: ValueAndGrad, z: Tensor) -> Tensor:
    """The log-joint at z, where autograd is to find the gradient that the likelihood gives."""
    value, grad = likelihood(z.detach())
    return log_prior_fn(z) + value + (grad * (z - z.detach())).sum(-1)


class PersistentChains(nn.Module):
    r"""K chains for each of N training images, kept from one visit to the next.

    This is what amortisation saves: N K D numbers, and no samples for an image never seen. The
    table is a buffer, so that it moves with ``.to(device)`` and ``training.fit`` keeps it in its
    checkpoints when it is named in ``state``. It starts at :math:`\mathcal{N}(0, I)`, drawn from
    the global stream (an assumption: the source does not say).

    :param num_data: N.
    :param latent_dim: D.
    :param num_chains: K.
    :raises ValueError: when a number is no positive integer.

    >>> chains = PersistentChains(num_data=60_000, latent_dim=32)
    >>> chains.num_bytes, chains(torch.tensor([3, 5])).shape
    (7680000, torch.Size([1, 2, 32]))
    """

    def __init__(self, num_data: int, latent_dim: int, num_chains: int = 1):
        super().__init__()
        check_counts(num_data=num_data, latent_dim=latent_dim, num_chains=num_chains)
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


# --- rules of distillation -----------------------------------------------------------------------


class Lesson(NamedTuple):
    """What the losses of a :class:`Rule` may look at, for one minibatch.

    ``model`` is p(x, z); ``discriminator`` is D(x, z), or None; ``x`` is ``[B, P]``; ``z_student``,
    ``[K, B, D]``, has the graph of its draw; ``z_teacher``, ``[M, B, D]``, has none; ``q`` is the
    student's distribution where the rule needs a density, and otherwise None; ``encoder`` is the
    student.
    """

    model: LatentVariableModel
    discriminator: Critic | None
    x: Tensor
    z_student: Tensor
    z_teacher: Tensor
    q: Distribution | None
    encoder: Encoder


class Rule(NamedTuple):
    r"""How a student is drawn to its teacher: a loss for it, and one for a discriminator, if any.

    A loss maps a :class:`Lesson` to one value for each observation. Where the rule is a game, the
    discriminator first takes ``num_critic_steps`` steps on its loss. Then the student takes one on
    its own. Each is descended in the parameters of its own network alone (:func:`descend`).

    The student must offer ``min_samples`` samples for each observation or more, and a distribution
    if the rule ``needs_density``; otherwise its samples must have a gradient. ``critic`` makes
    D(x, z) of a minibatch from the discriminator, where that asks for more than x and z
    (:func:`informed`, :func:`standardised`). ``RULES`` holds five:

    - ``"gan"``, ``"wasserstein"`` and ``"relativistic"``, the games :func:`gan`,
      :func:`wasserstein` and :func:`relativistic`;
    - ``"mmd"``: :func:`amortised.adversarial.mmd_squared`, of at least 8 samples;
    - ``"inclusive_kl"``: :math:`-\mathbb{E}_{q_T} \log q_\phi(z \mid x)`, which needs a density.

    Another is a line or two, such as this one, which matches the means:

    >>> rule = Rule("means", lambda s: (s.z_student.mean(0) - s.z_teacher.mean(0)).square().sum(-1))
    >>> rule.is_game, list(RULES)
    (False, ['gan', 'wasserstein', 'relativistic', 'mmd', 'inclusive_kl'])
    """

    name: str
    student_loss: Callable[[Lesson], Tensor]
    discriminator_loss: Callable[[Lesson], Tensor] | None = None
    num_critic_steps: int = 1
    min_samples: int = 1
    needs_density: bool = False
    critic: Callable[[Lesson], Critic] | None = None

    @property
    def is_game(self) -> bool:
        """Whether the rule has a discriminator."""
        return self.discriminator_loss is not None


def gan(num_critic_steps: int = 1) -> Rule:
    """The original game, with :func:`amortised.adversarial.discriminator_loss` and, for the
    student, :func:`amortised.adversarial.generator_loss`.

    :param num_critic_steps: steps of the discriminator on the samples of one minibatch.

    >>> gan(num_critic_steps=2).name
    'gan'
    """
    return Rule(
        "gan",
        lambda s: adversarial.generator_loss(s.discriminator, s.x, s.z_student),
        lambda s: adversarial.discriminator_loss(s.discriminator, s.x, s.z_teacher, s.z_student),
        num_critic_steps,
    )


def wasserstein(num_critic_steps: int = 5, penalty_weight: float = 10.0) -> Rule:
    """The Wasserstein game, with :func:`amortised.adversarial.critic_loss`, which wants as many
    samples of the teacher as of the student, and, for the student,
    :func:`amortised.adversarial.critic_student_loss`.

    :param num_critic_steps: steps of the critic on the samples of one minibatch.
    :param penalty_weight: weight of the gradient penalty.

    Source: the defaults are those of Gulrajani et al. (2017).

    >>> wasserstein(penalty_weight=0.1).num_critic_steps
    5
    """
    critic_loss = partial(adversarial.critic_loss, penalty_weight=penalty_weight)
    return Rule(
        "wasserstein",
        lambda s: adversarial.critic_student_loss(s.discriminator, s.x, s.z_student),
        lambda s: critic_loss(s.discriminator, s.x, s.z_teacher, s.z_student),
        num_critic_steps,
    )


def relativistic() -> Rule:
    """The game of pairs, with :func:`amortised.adversarial.relativistic_loss` for both sides.

    >>> relativistic().is_game
    True
    """
    loss = adversarial.relativistic_loss
    return Rule(
        "relativistic",
        lambda s: loss(s.discriminator, s.x, s.z_student, s.z_teacher),
        lambda s: loss(s.discriminator, s.x, s.z_teacher, s.z_student.detach()),
    )


def informed(game: Rule) -> Rule:
    """The game whose discriminator, an :class:`amortised.adversarial.InformedDiscriminator`, is
    told log p(x|z) and the squared norm of z.

    :param game: such as :func:`gan` or :func:`relativistic`.

    >>> informed(gan()).name
    'informed gan'
    """
    return game._replace(name=f"informed {game.name}", critic=_informed_critic)


def standardised(game: Rule, num_samples: int = 16) -> Rule:
    """The informed game in the student's own coordinates.

    The student's moments at each observation are those of fresh draws of it, without gradient; the
    network of the discriminator takes 2 D latents.

    :param game: such as :func:`gan` or :func:`relativistic`.
    :param num_samples: draws for the moments.

    >>> standardised(relativistic()).name
    'standardised relativistic'
    """
    critic = partial(_standardised_critic, num_samples=num_samples)
    return game._replace(name=f"standardised {game.name}", critic=critic)


def _informed_critic(lesson: Lesson) -> Critic:
    return partial(lesson.discriminator, log_likelihood_fn=lesson.model.log_likelihood)


def _standardised_critic(lesson: Lesson, num_samples: int) -> Critic:
    critic = _informed_critic(lesson)
    with torch.no_grad():
        z = student_samples(lesson.encoder, lesson.x, num_samples)
    moments = adversarial.student_moments(lesson.x, z, lesson.model.log_likelihood)
    return partial(critic, moments=moments)


_MMD = Rule(
    "mmd", lambda s: adversarial.mmd_squared(s.z_student, s.z_teacher), min_samples=MIN_MMD_SAMPLES
)
_INCLUSIVE_KL = Rule("inclusive_kl", lambda s: -s.q.log_prob(s.z_teacher), needs_density=True)
RULES = {rule.name: rule for rule in (gan(), wasserstein(), relativistic(), _MMD, _INCLUSIVE_KL)}

# That of `mcmc_vi_step`, which looks away from the teacher.
_ELBO = Rule(
    "elbo",
    lambda s: -elbo(s.model, s.q, s.x, len(s.z_student), analytic_kl=True),
    needs_density=True,
)


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
    optimizers: Optimizers,
    *,
    teacher: Teacher,
    rule: str | Rule = "gan",
    discriminator: Critic | None = None,
    num_samples: int = 1,
) -> dict[str, Tensor]:
    r"""One training step of amortised MCMC.

    1. Propose :math:`z_0 \sim q_\phi(z \mid x)` and improve it to :math:`z_T`.
    2. The decoder ascends :math:`\log p_\theta(x, z_T)`.
    3. In a game the discriminator descends its loss; then the student descends that of the rule.

    :param x: observations, ``[B, P]``; binary images are drawn anew before each call.
    :param model: the decoder.
    :param encoder: the student.
    :param optimizers: for ``"encoder"``; for ``"discriminator"`` in a game; for ``"model"`` unless
        the decoder is fixed.
    :param teacher: maps x and :math:`z_0` to samples ``[M, B, D]`` without graph, usually
        ``partial(teacher_samples, model, ...)``. To learn from the whole path return
        ``teacher_chain(...).samples.flatten(0, 1)``.
    :param rule: a :class:`Rule`, or the name of one in ``RULES``.
    :param discriminator: D(x, z) of a game, or its critic.
    :param num_samples: K samples of the student for each observation.
    :return: the mean losses ``"model"``, ``"discriminator"`` and ``"encoder"``, those that apply.
    :raises ValueError: for an unknown name, too few samples, or a discriminator or an optimiser
        that is missing or not used.
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
    if not isinstance(rule, Rule):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, or a Rule; got {rule!r}")
        rule = RULES[rule]
    if rule.is_game != (discriminator is not None):
        raise ValueError(
            f"rule {rule.name!r} {'needs a' if rule.is_game else 'has no'} discriminator"
        )
    _check_optimizers(optimizers, {"encoder"} | ({"discriminator"} if rule.is_game else set()))
    check_counts(minimum=rule.min_samples, num_samples=num_samples)

    q = _distribution(encoder, x) if rule.needs_density else None
    z_student = student_samples(encoder, x, num_samples) if q is None else _draw(q, num_samples)
    if q is None and not z_student.requires_grad:
        raise TypeError(f"rule {rule.name!r} needs a student whose samples have a gradient")
    z_teacher = teacher(x, z_student.detach())
    losses = {}
    if "model" in optimizers:
        losses["model"] = descend(-log_joint_fn(model)(x, z_teacher), optimizers["model"])
    lesson = Lesson(model, discriminator, x, z_student, z_teacher, q, encoder)
    if rule.critic is not None:
        lesson = lesson._replace(discriminator=rule.critic(lesson))
    for _ in range(rule.num_critic_steps if rule.is_game else 0):
        loss = rule.discriminator_loss(lesson)
        losses["discriminator"] = descend(loss, optimizers["discriminator"])
    losses["encoder"] = descend(rule.student_loss(lesson), optimizers["encoder"])
    return losses


def vae_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: Callable[[Tensor], Distribution],
    optimizers: Optimizers,
    *,
    num_samples: int = 1,
    kl_weight: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    r"""No chain: student and decoder ascend the ELBO together, its divergence in closed form.

    :param kl_weight: factor of the divergence. Raised from 0 to 1 early in training (KL warm-up) it
        keeps the encoder from falling back on the prior before the decoder needs z.
    :return: the mean of the negative ELBO, ``"loss"``; other arguments as in :func:`amc_step`.
    :raises TypeError: when q has no density.

    Source: Kingma and Welling (2014); warm-up: Bowman and others (2016).

    >>> from amortised.encoders import GaussianEncoder
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> encoder = GaussianEncoder(1, nn.Identity(), num_features=1)
    >>> optimizers = {"encoder": torch.optim.Adam(encoder.parameters())}
    >>> list(vae_step(torch.ones(5, 1), model, encoder, optimizers))
    ['loss']
    """
    _check_optimizers(optimizers, {"encoder"})
    q = _distribution(encoder, x)
    loss = -elbo(model, q, x, num_samples, analytic_kl=True)
    if isinstance(kl_weight, Tensor) or kl_weight != 1.0:
        loss = loss - (1.0 - kl_weight) * kl_divergence(q, model.prior())
    return {"loss": descend(loss, *optimizers.values())}


def mcmc_vi_step(
    x: Tensor, model: LatentVariableModel, encoder: Encoder, optimizers: Optimizers, **settings
) -> dict[str, Tensor]:
    r"""MCMC-corrected VI: the decoder learns from :math:`z_T`, the student from the ELBO alone.

    Nothing pulls the student towards the teacher, so samples at test time still need the chain.

    :param settings: ``teacher`` and ``num_samples``, as in :func:`amc_step`.
    :return: the mean losses ``"model"`` and ``"encoder"``; other arguments as in :func:`amc_step`.
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
    return amc_step(x, model, encoder, optimizers, rule=_ELBO, **settings)


def avb_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: Encoder,
    optimizers: Optimizers,
    *,
    discriminator: Critic,
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
    optimizers: Optimizers,
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
    return {"model": descend(-log_joint_fn(model)(x, z), optimizers["model"])}


def short_run_step(
    x: Tensor, model: LatentVariableModel, optimizers: Optimizers, *, teacher: Teacher
) -> dict[str, Tensor]:
    """No student and no memory: at each visit a chain sets out from the prior anew.

    It is the control of a student: what the same chain does without one.

    :return: the mean loss ``"model"``; arguments as in :func:`amc_step`.

    Source: Nijkamp, Hill, Zhu and Wu (2019), who train energy-based models so; the name is theirs.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> optimizers = {"model": torch.optim.Adam(model.parameters())}
    >>> teacher = partial(teacher_samples, model, num_steps=5, step_size=0.2)
    >>> list(short_run_step(torch.ones(5, 1), model, optimizers, teacher=teacher))
    ['model']
    """
    _check_optimizers(optimizers, {"model"})
    z = teacher(x, _draw(model.prior(), 1, len(x)))
    return {"model": descend(-log_joint_fn(model)(x, z), optimizers["model"])}


def _check_optimizers(optimizers: Optimizers, required: set[str]) -> None:
    if not required <= optimizers.keys() <= required | {"model"}:
        raise ValueError(
            f"this step needs optimizers for {', '.join(sorted(required))}, and takes one for "
            f"model; got {', '.join(optimizers) or 'none'}"
        )


def _check_finite(z: Tensor, what: str) -> None:
    if not all_finite(z):
        raise FloatingPointError(f"{what} are not finite; use a smaller step_size or learning rate")
