r"""Learning to infer: encoders that correct their answer by looking at how good it is.

The approximate posterior of one observation is the Gaussian with *parameters*
:math:`\lambda = (\mu, \log \sigma)`, one row ``[2D]`` of a tensor. All ways to find it have one
form, a *step* that maps the present state of the inference to new parameters:

.. math:: \lambda_t = \lambda_{t-1} + \alpha \nabla_\lambda \mathcal{L} \ \text{ (optimisation)},
    \qquad \lambda = f_\phi(x) \ \text{ (standard encoder)}, \qquad
    \lambda_t = f_\phi(x, \lambda_{t-1}, \nabla_\lambda \mathcal{L}) \ \text{ (iterative encoder)}

:func:`refine` repeats any of them and keeps the trace; :func:`iterative_step` trains the last two.
A model of several levels is one whose latent is the vector of all levels
(:class:`amortised.models.DeepLatentGaussian`): its prior is conditional, and nothing else changes.

Gradients are those of each example's own bound, not of the mean over a batch, and no statistic of a
batch is used anywhere: an example's posterior does not depend on its neighbours.

Source: Marino, Yue and Mandt (2018). Here logarithms of scales stand for those of variances, and
smooth bounds for clamps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import elu
from torch.optim import Optimizer

from .encoders import bounded_log_scale
from .models import AncestralGaussian, LatentVariableModel, as_model, conditional_normal
from .numerics import argument_validation, check_counts
from .objectives import check_proposal

#: What an encoder can read of a state; see :meth:`InferenceState.read`.
INPUTS = ("x", "gradient", "log_gradient", "errors", "estimates")


def gaussian(parameters: Tensor) -> Independent:
    r"""The approximate posterior :math:`\mathcal{N}(\mu, \mathrm{diag}\, \sigma^2)`.

    :param parameters: :math:`\lambda = (\mu, \log \sigma)`, ``[..., 2D]``.

    >>> gaussian(torch.zeros(5, 6)).event_shape
    torch.Size([3])
    """
    mean, log_scale = parameters.chunk(2, -1)
    return Independent(Normal(mean, log_scale.exp()), 1)


class Terms(NamedTuple):
    """The parts of a bound of B examples by K draws.

    :ivar elbo: ``[B]``, in nats.
    :ivar divergences: of each coordinate, ``[B, D]``, in nats.
    :ivar z: the draws, ``[K, B, D]``.
    :ivar likelihood: the law of x given each draw.
    :ivar prior: the law of each coordinate given the levels above.
    """

    elbo: Tensor
    divergences: Tensor
    z: Tensor
    likelihood: Distribution
    prior: Normal


class InferenceState(NamedTuple):
    r"""Where the inference of a batch stands, without a graph.

    :ivar x: observations, ``[B, P]``.
    :ivar parameters: :math:`\lambda`, ``[B, 2D]``.
    :ivar iteration: t, 0 at the start.
    :ivar elbo: an estimate of each bound, ``[B]``, in nats; None where nobody has asked.
    :ivar gradient: of that estimate in :math:`\lambda`, ``[B, 2D]``.
    :ivar terms: what else was found with it.
    """

    x: Tensor
    parameters: Tensor
    iteration: int = 0
    elbo: Tensor | None = None
    gradient: Tensor | None = None
    terms: Terms | None = None

    def read(self, name: str, counts: bool = False) -> Tensor:
        r"""One input of an encoder.

        ============ =======================================================================
        x            :math:`x - \tfrac12`, or :math:`\log(1 + x)` for counts; ``[B, P]``
        gradient     :math:`\nabla_\lambda \mathcal{L}`, normalised over the features of each
                     example (mean 0, variance 1); ``[B, 2D]``
        log_gradient :math:`\log(|\nabla_\lambda \mathcal{L}| + 10^{-5})` and the signs;
                     ``[B, 4D]``
        errors       bottom-up and top-down, :math:`x - \mathbb{E}[x \mid z]` and
                     :math:`z - \mu_p`, means over the draws; ``[B, P + D]``
        estimates    :math:`\lambda`; ``[B, 2D]``
        ============ =======================================================================
        """
        if name == "x":
            return self.x.log1p() if counts else self.x - 0.5
        if name == "gradient":
            return nn.functional.layer_norm(self.gradient, self.gradient.shape[-1:])
        if name == "log_gradient":
            return torch.cat([(self.gradient.abs() + 1e-5).log(), self.gradient.sign()], -1)
        if name == "errors":
            below, above = self.x - self.terms.likelihood.mean, self.terms.z - self.terms.prior.mean
            return torch.cat([below.mean(0), above.mean(0)], -1)
        return self.parameters


Step = Callable[[InferenceState], Tensor]


class RefineTrace(NamedTuple):
    r"""What :func:`refine` has seen; entry 0 is the start.

    :ivar parameters: :math:`\lambda_0, \dots, \lambda_T`, ``[T + 1, B, 2D]``.
    :ivar elbo: the estimate of each bound, ``[T + 1, B]``, in nats.
    :ivar gradient: its gradient in :math:`\lambda`, ``[T + 1, B, 2D]``.
    """

    parameters: Tensor
    elbo: Tensor
    gradient: Tensor


# --- the bound -----------------------------------------------------------------------------------


def _terms(model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int) -> Terms:
    z = q.rsample((num_samples,))
    likelihood, prior = as_model(model).likelihood(z), conditional_normal(model.prior(), z)
    divergences = kl_divergence(conditional_normal(q, z), prior).expand_as(z).mean(0)
    elbo = likelihood.log_prob(x).mean(0) - divergences.sum(-1)
    return Terms(elbo, divergences, z, likelihood, prior)


def level_elbo(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int = 1
) -> tuple[Tensor, Tensor]:
    r"""The evidence lower bound of a model of one or more levels, each divergence in closed form.

    .. math:: \mathcal{L} = \mathbb{E}_q\Bigl[\log p_\theta(x \mid z) - \sum_{\ell}
        \mathrm{KL}\bigl(q(z^\ell \mid z^{>\ell}, x) \,\|\, p_\theta(z^\ell \mid z^{>\ell})\bigr)
        \Bigr]

    :param q: an ``Independent`` Normal or an :class:`amortised.models.AncestralGaussian`, of batch
        shape ``[B]``; so is the model's prior.
    :param num_samples: draws for the outer expectation.
    :return: the bound ``[B]`` and the divergence of each coordinate ``[B, D]``, in nats. Sums over
        the coordinates of a level tell whether that level is used.
    :raises ValueError: when there is not one law for each observation, or no draw.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, q = torch.ones(1, 1), gaussian(torch.tensor([[0.5, -0.3466]]))  # the posterior
    >>> elbo, _ = level_elbo(model, q, x, num_samples=10_000)
    >>> bool((elbo - model.log_evidence(x)).abs() < 0.02)
    True
    """
    check_counts(num_samples=num_samples)
    check_proposal(q, x)
    terms = _terms(model, q, x, num_samples)
    return terms.elbo, terms.divergences


def start_at_prior(model: LatentVariableModel, x: Tensor) -> InferenceState:
    r"""The state before the first iteration: :math:`\lambda_0` is the prior.

    In a hierarchy each level starts at its conditional prior given the *means* of those above.

    >>> from amortised.models import DeepLatentGaussian
    >>> start_at_prior(DeepLatentGaussian([2], 3), torch.zeros(5, 3)).parameters.abs().max()
    tensor(0.)
    """
    with torch.no_grad():
        prior = as_model(model).prior()
        z = x.new_zeros(*x.shape[:-1], model.latent_dim)
        if isinstance(prior, AncestralGaussian):
            z = prior.descend(z)
        normal = conditional_normal(prior, z)
        parameters = torch.cat([normal.mean.expand_as(z), normal.stddev.log().expand_as(z)], -1)
    return InferenceState(x, parameters)


def look(
    model: LatentVariableModel, state: InferenceState, num_samples: int = 1, learn: bool = False
) -> InferenceState:
    r"""Decode once: the bound at the parameters of a state, and its gradient.

    :param num_samples: draws of z.
    :param learn: add the gradient of :math:`-\frac1B \sum_b \mathcal{L}_b` to the ``grad`` of the
        model's parameters, too, in the same backward pass.
    :return: the state with what was found.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> state = look(model, start_at_prior(model, torch.ones(1, 1)), num_samples=100_000)
    >>> state.gradient.round()  # W (x - W mu) - mu = 1; 1 - 2 sigma^2 = -1
    tensor([[ 1., -1.]])
    """
    parameters = state.parameters.detach().requires_grad_()
    with torch.enable_grad():
        terms = _terms(model, gaussian(parameters), state.x, num_samples)
        learners = [p for p in as_model(model).parameters() if learn and p.requires_grad]
        terms.elbo.sum().neg().div(len(state.x)).backward(inputs=[parameters, *learners])
    found = {"elbo": terms.elbo.detach(), "gradient": -len(state.x) * parameters.grad}
    return state._replace(parameters=parameters.detach(), terms=terms, **found)


# --- encoders ------------------------------------------------------------------------------------


class Highway(nn.Module):
    r"""Dense layers, each a gated mean of its input and of what it makes of it.

    .. math:: h_1 = g \odot A x + (1 - g) \odot \mathrm{elu}(B x), \qquad
        h_l = g \odot h_{l-1} + (1 - g) \odot \mathrm{elu}(B h_{l-1}), \qquad
        g = \mathrm{sigmoid}(C \,\cdot)

    :param num_inputs: width of x.
    :param num_hidden: width of each layer.
    :param num_layers: how many.

    >>> Highway(3, 8, 2)(torch.zeros(5, 3)).shape
    torch.Size([5, 8])
    """

    def __init__(self, num_inputs: int, num_hidden: int, num_layers: int = 2):
        super().__init__()
        widths = [num_inputs, *num_layers * [num_hidden]]
        self.skip = nn.Linear(num_inputs, num_hidden)
        self.layers = nn.ModuleList(nn.Linear(i, 2 * o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., num_inputs] -> [..., num_hidden]``."""
        carried = self.skip(x)
        for layer in self.layers:
            gate, new = layer(x).chunk(2, -1)
            gate = gate.sigmoid()
            carried = x = gate * carried + (1 - gate) * elu(new)
        return x


class IterativeEncoder(nn.Module):
    r"""An encoder that reads a state and returns new parameters.

    .. math:: \lambda_t = g \odot \lambda_{t-1} + (1 - g) \odot f, \qquad
        g = \mathrm{sigmoid}(\cdot),

    where f (its scales smoothly bounded) and the gate g are heads of one trunk over the inputs,
    and every input is detached. A *standard encoder* is ``inputs=("x",), gated=False``: it looks
    at the observation alone, answers at once, and further iterations repeat the answer.

    :param latent_dim: D.
    :param observation_dim: P.
    :param inputs: what it reads, a choice of :data:`INPUTS`.
    :param gated: whether it mixes its answer with the parameters before; else :math:`g = 0`.
    :param counts: whether observations are counts of words.
    :param num_hidden: width of the trunk.
    :param num_layers: layers of the trunk, a :class:`Highway`.
    :raises ValueError: for an unknown input, or none.

    >>> encoder = IterativeEncoder(2, 784, inputs=("x", "gradient"), num_hidden=16)
    >>> state = InferenceState(torch.zeros(5, 784), torch.zeros(5, 4), gradient=torch.randn(5, 4))
    >>> encoder(state).shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        latent_dim: int,
        observation_dim: int,
        inputs: Sequence[str] = ("x", "log_gradient", "estimates"),
        gated: bool = True,
        counts: bool = False,
        num_hidden: int = 256,
        num_layers: int = 2,
    ):
        super().__init__()
        if not inputs or not set(inputs) <= set(INPUTS) or len(set(inputs)) < len(inputs):
            raise ValueError(f"inputs must be some of {', '.join(INPUTS)}, once; got {inputs!r}")
        self.inputs, self.gated, self.counts = tuple(inputs), gated, counts
        size = {"x": observation_dim, "errors": observation_dim + latent_dim}
        size |= {"log_gradient": 4 * latent_dim}
        num_inputs = sum(size.get(name, 2 * latent_dim) for name in inputs)
        self.trunk = Highway(num_inputs, num_hidden, num_layers)
        self.head = nn.Linear(num_hidden, 2 * latent_dim)
        self.gate = nn.Linear(num_hidden, 2 * latent_dim) if gated else None

    @property
    def needs_decoding(self) -> bool:
        """Whether it reads what only a pass through the decoder can tell."""
        return bool({"gradient", "log_gradient", "errors"} & set(self.inputs))

    def forward(self, state: InferenceState) -> Tensor:
        r"""New parameters :math:`\lambda_t`, ``[B, 2D]``."""
        read = torch.cat([state.read(name, self.counts) for name in self.inputs], -1)
        features = self.trunk(read.detach())
        mean, raw = self.head(features).chunk(2, -1)
        answer = torch.cat([mean, bounded_log_scale(raw)], -1)
        if self.gate is None:
            return answer
        gate = self.gate(features).sigmoid()
        return gate * state.parameters.detach() + (1 - gate) * answer


class LadderEncoder(nn.Module):
    r"""A one-step encoder with a top-down pass: it meets the prior, but sees no gradient.

    Bottom-up, each level gets an estimate :math:`(\hat\mu^\ell, \hat\sigma^\ell)` from x. Top-down,
    below the top, it is weighed by its precision against the prior given the level above,

    .. math:: q(z^\ell \mid z^{\ell+1}, x) = \mathcal{N}\Bigl(\frac{\hat\mu^\ell \hat\sigma^{-2} +
        \mu_p \sigma_p^{-2}}{\hat\sigma^{-2} + \sigma_p^{-2}},\
        \frac{1}{\hat\sigma^{-2} + \sigma_p^{-2}}\Bigr).

    :param latent_dims: dimensions of the levels, lowest first.
    :param observation_dim: P.
    :param num_hidden: width of the trunks; each level has one on top of that below.
    :param num_layers: layers of each.
    :param counts: whether observations are counts of words.

    Source: Sønderby et al. (2016), equations 11 to 13.

    >>> from amortised.models import DeepLatentGaussian
    >>> model, x = DeepLatentGaussian((3, 2), 784), torch.zeros(5, 784)
    >>> q = LadderEncoder((3, 2), 784)(x, model)
    >>> q.log_prob(q.rsample((7,))).shape
    torch.Size([7, 5])
    """

    def __init__(
        self,
        latent_dims: Sequence[int],
        observation_dim: int,
        counts: bool = False,
        num_hidden: int = 256,
        num_layers: int = 2,
    ):
        super().__init__()
        self.latent_dims, self.counts = tuple(latent_dims), counts
        below = [observation_dim, *(len(latent_dims) - 1) * [num_hidden]]
        self.trunks = nn.ModuleList(Highway(n, num_hidden, num_layers) for n in below)
        self.heads = nn.ModuleList(nn.Linear(num_hidden, 2 * size) for size in latent_dims)

    def forward(self, x: Tensor, model: LatentVariableModel) -> AncestralGaussian:
        """The posterior of all levels, of batch shape ``[B]``, for observations ``[B, P]``."""
        h, pairs = InferenceState(x, x).read("x", self.counts), []
        for trunk, head in zip(self.trunks, self.heads, strict=True):
            h = trunk(h)
            pairs.append(head(h).chunk(2, -1))
        mean, raw = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
        precision = (-2.0 * bounded_log_scale(raw)).exp()
        num_weighed = sum(self.latent_dims[:-1])

        def conditional(z: Tensor) -> Normal:
            prior = conditional_normal(model.prior(), z)
            weight = prior.stddev.pow(-2.0).expand_as(z).clone()
            weight[..., num_weighed:] = 0.0
            total = precision + weight
            return Normal((precision * mean + weight * prior.mean) / total, total.rsqrt())

        return AncestralGaussian(conditional, self.latent_dims, mean)


# --- inference and training ----------------------------------------------------------------------


def gradient_ascent(make_optimizer: Callable[[list[Tensor]], Optimizer]) -> Step:
    r"""Conventional optimisation as a step: :math:`\lambda \leftarrow \lambda + \alpha\,
    \nabla_\lambda \mathcal{L}`, or what an optimiser makes of that gradient.

    Its state begins anew at each iteration 0.

    :param make_optimizer: maps a list of one tensor to an optimiser of it, for instance
        ``partial(torch.optim.Adam, lr=0.1)``. The optimisers of PyTorch work on each number alone,
        so examples do not mix.

    >>> step = gradient_ascent(lambda tensors: torch.optim.SGD(tensors, lr=0.1))
    >>> step(InferenceState(torch.zeros(1, 1), torch.zeros(1, 2), gradient=torch.ones(1, 2)))
    tensor([[0.1000, 0.1000]])
    """
    held: list = []

    def step(state: InferenceState) -> Tensor:
        if state.iteration == 0:
            tensor = state.parameters.detach().clone()
            held[:] = tensor, make_optimizer([tensor])
        tensor, optimizer = held
        tensor.grad = -state.gradient
        optimizer.step()
        return tensor.clone()

    return step


@torch.no_grad()
@argument_validation(False)  # of laws, so that a step too far is named by the check below
def refine(
    model: LatentVariableModel,
    step: Step,
    x: Tensor,
    num_steps: int,
    *,
    start: Tensor | None = None,
    num_samples: int = 1,
) -> RefineTrace:
    r"""Infer: repeat a step, and keep everything.

    With a gradient step and ``start`` from an encoder this is *semi-amortised* inference. Each
    bound is a new estimate with ``num_samples`` draws; T steps cost T + 1 passes through the
    decoder, forward and back.

    :param step: an :class:`IterativeEncoder`, a :func:`gradient_ascent`, or any such map.
    :param x: observations, ``[B, P]``.
    :param num_steps: T.
    :param start: :math:`\lambda_0`, ``[B, 2D]``; by default the prior.
    :param num_samples: draws of z for each estimate of the bound and its gradient.
    :raises ValueError: when ``start`` has another shape, or a number is too small.
    :raises FloatingPointError: when a bound is not finite, naming the iteration and the example.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> ascent = gradient_ascent(lambda tensors: torch.optim.SGD(tensors, lr=0.1))
    >>> trace = refine(model, ascent, torch.ones(4, 1), num_steps=50, num_samples=100)
    >>> trace.elbo.shape, bool((trace.parameters[-1, :, 0] - 0.5).abs().max() < 0.1)
    (torch.Size([51, 4]), True)
    """
    check_counts(num_samples=num_samples)
    check_counts(minimum=0, num_steps=num_steps)
    state = start_at_prior(model, x)
    if start is not None:
        if start.shape != state.parameters.shape:
            raise ValueError(
                f"start must be (mean, log scale), {tuple(state.parameters.shape)}; got "
                f"{tuple(start.shape)}"
            )
        state = state._replace(parameters=start.detach())
    kept = []
    for iteration in range(num_steps + 1):
        state = look(model, state, num_samples)
        if not state.elbo.isfinite().all():
            example = int((~state.elbo.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the bound of example {example} is not finite at iteration {iteration}; take "
                "smaller steps"
            )
        kept.append((state.parameters, state.elbo, state.gradient))
        if iteration < num_steps:
            state = state._replace(parameters=step(state), iteration=iteration + 1)
    return RefineTrace(*map(torch.stack, zip(*kept, strict=True)))


def posterior(
    model: LatentVariableModel,
    encoder: nn.Module,
    x: Tensor,
    num_iterations: int = 1,
    num_samples: int = 1,
) -> Distribution:
    """What an encoder of any kind makes of observations after some iterations.

    :param encoder: an :class:`IterativeEncoder` or a :class:`LadderEncoder`.
    :param num_iterations: T; one is all that encoders without the decoder's view make use of.
    :param num_samples: draws for each gradient that the encoder reads.
    """
    if isinstance(encoder, LadderEncoder):
        return encoder(x, model)
    state = start_at_prior(model, x)
    for iteration in range(num_iterations):
        if encoder.needs_decoding:
            state = look(model, state, num_samples)
        state = state._replace(parameters=encoder(state), iteration=iteration + 1)
    return gaussian(state.parameters)


def iterative_step(
    x: Tensor,
    model: LatentVariableModel,
    encoder: nn.Module,
    optimizers: Iterable[Optimizer],
    *,
    num_iterations: int,
    num_samples: int = 1,
) -> Mapping[str, Tensor]:
    r"""One update of model and encoder.

    The encoder descends :math:`-\frac1T \sum_{t=1}^{T} \mathcal{L}(\lambda_t)` and the model
    :math:`-\mathcal{L}(\lambda_T)`; no gradient crosses from one iteration to the next. The
    gradient in :math:`\lambda_t` that trains the encoder at iteration t is its input at t + 1, so
    that T iterations take T + 1 passes through the decoder, and T where the encoder does not read
    what they tell. With one iteration and x alone it is the update of a variational auto-encoder.

    :param x: observations, ``[B, P]``.
    :param encoder: an :class:`IterativeEncoder`, or a :class:`LadderEncoder` (one iteration).
    :param optimizers: of the networks to change; to train an encoder for a fixed model, give its
        own alone.
    :param num_iterations: T.
    :param num_samples: draws of z for each bound.
    :return: ``loss``, :math:`-\mathcal{L}(\lambda_T)`, and ``first``, :math:`-\mathcal{L}
        (\lambda_1)`; means over the batch, in nats.

    Source: Marino, Yue and Mandt (2018) and their code.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if isinstance(encoder, LadderEncoder):
        loss = first = -level_elbo(model, encoder(x, model), x, num_samples)[0].mean()
        loss.backward()
    else:
        state, first = start_at_prior(model, x), None
        if encoder.needs_decoding:
            state = look(model, state, num_samples)
        for iteration in range(1, num_iterations + 1):
            parameters = encoder(state)
            state = state._replace(parameters=parameters, iteration=iteration)
            state = look(model, state, num_samples, learn=iteration == num_iterations)
            parameters.backward(-state.gradient / (len(x) * num_iterations))
            loss = -state.elbo.mean()
            first = loss if first is None else first
    for optimizer in optimizers:
        optimizer.step()
    return {"loss": loss.detach(), "first": first.detach()}
