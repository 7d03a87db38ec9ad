r"""Latent-variable models :math:`p_\theta(x, z) = p(z)\, p_\theta(x \mid z)`."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor, distributions, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from .encoders import bounded_log_scale
from .numerics import check_counts, seeded

Conditional = Callable[[Tensor], Normal]
_RANDOM_IN_TRAINING = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm


class LatentVariableModel(nn.Module):
    r"""A model with latent :math:`z \in \mathbb{R}^D` and observation :math:`x \in \mathbb{R}^P`.

    Subclasses define :meth:`likelihood`, or :meth:`log_likelihood` if nothing is to be drawn; the
    prior is :math:`\mathcal{N}(0, I_D)` unless they override :meth:`prior`. Shapes broadcast from
    the right: latents ``[K, B, D]`` meet observations ``[B, P]``. A model need not be a subclass:
    :func:`as_model`.

    :param latent_dim: D.
    :param observation_dim: P.
    """

    def __init__(self, latent_dim: int, observation_dim: int):
        super().__init__()
        check_counts(latent_dim=latent_dim, observation_dim=observation_dim)
        self.latent_dim = latent_dim
        self.observation_dim = observation_dim

    def prior(self) -> Distribution:
        r"""The prior :math:`p(z)`, :math:`\mathcal{N}(0, I_D)` by default; event shape ``[D]``."""
        zeros = like(self).new_zeros(self.latent_dim)
        return Independent(Normal(zeros, torch.ones_like(zeros)), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        r"""The conditional law :math:`p_\theta(x \mid z)`.

        :param z: latents, ``[..., D]``.
        :return: a distribution of batch shape ``[...]`` and event shape ``[P]``.
        """
        raise TypeError(f"the model has no likelihood(z): {PROTOCOL['likelihood']}")

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        r""":math:`\log p_\theta(x \mid z)` in nats.

        :param x: observations, ``[B, P]`` (or any shape that broadcasts with ``z``).
        :param z: latents, ``[B, D]`` or ``[K, B, D]``.
        :return: ``[B]`` or ``[K, B]``.
        :raises ValueError: when the last dimensions are not P and D.
        """
        x = self._checked(x, z)
        return self.likelihood(z).log_prob(x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        r""":math:`\log p_\theta(x, z) = \log p(z) + \log p_\theta(x \mid z)` in nats.

        Normalising constants are kept, so that ``log_joint`` minus a normalised ``log q`` is a
        log-weight for :math:`p_\theta(x)`. Arguments and errors as in :meth:`log_likelihood`.
        """
        x = self._checked(x, z)
        return self.prior().log_prob(z) + self.log_likelihood(x, z)

    @torch.no_grad()
    def sample(self, num_samples: int) -> tuple[Tensor, Tensor]:
        r"""Ancestral samples :math:`z \sim p(z)`, :math:`x \sim p_\theta(x \mid z)`.

        Uses PyTorch's global random stream.

        :return: observations ``[num_samples, P]`` and latents ``[num_samples, D]``.
        """
        z = self.prior().sample((num_samples,))
        return self.likelihood(z).sample(), z

    def _checked(self, x: Tensor, z: Tensor) -> Tensor:
        """The observations in the type of ``z``: those of bytes, truth values or doubles, too."""
        if z.shape[-1:] != (self.latent_dim,):
            raise ValueError(f"z must end in latent_dim={self.latent_dim}; got {tuple(z.shape)}")
        if x.shape[-1:] != (self.observation_dim,):
            raise ValueError(
                f"x must end in observation_dim={self.observation_dim}; got shape "
                f"{tuple(x.shape)} (flatten images to [B, {self.observation_dim}])"
            )
        return x.to(z.dtype)


class LinearGaussian(LatentVariableModel):
    r"""Probabilistic principal component analysis: posterior and evidence in closed form.

    .. math::

        z \sim \mathcal{N}(0, I_D), \qquad x \mid z \sim \mathcal{N}(W z + b, \sigma^2 I_P)

        p(x) = \mathcal{N}(x;\, b,\, W W^\top + \sigma^2 I), \qquad
        p(z \mid x) = \mathcal{N}(z;\, M^{-1} W^\top (x - b),\, \sigma^2 M^{-1}), \quad
        M = W^\top W + \sigma^2 I

    It is the ground truth of the tests. The noise scale is learned through its logarithm.

    :param weight: W, ``[P, D]``.
    :param bias: b, ``[P]``.
    :param noise_scale: the standard deviation :math:`\sigma > 0`, a scalar.
    :raises ValueError: when shapes disagree or the scale is not positive.

    Source: Tipping and Bishop (1999).

    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> model.log_evidence(torch.tensor([[0.0], [1.5]]))
    tensor([-1.2655, -1.8280], grad_fn=...)
    """

    def __init__(self, weight: Tensor, bias: Tensor, noise_scale: float | Tensor):
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight must be [P, D], bias [P]; got {tuple(weight.shape)}, {tuple(bias.shape)}"
            )
        scale = torch.as_tensor(noise_scale, dtype=weight.dtype, device=weight.device)
        if scale.ndim != 0 or not scale > 0:
            raise ValueError(f"noise_scale must be a positive scalar; got {noise_scale}")
        super().__init__(latent_dim=weight.shape[1], observation_dim=weight.shape[0])
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.log_noise_scale = nn.Parameter(scale.detach().clone().log())

    @property
    def noise_scale(self) -> Tensor:
        r"""The standard deviation :math:`\sigma` of the observation noise, a scalar."""
        return self.log_noise_scale.exp()

    def likelihood(self, z: Tensor) -> Distribution:
        r""":math:`\mathcal{N}(W z + b, \sigma^2 I)` for latents ``[..., D]``."""
        return Independent(Normal(z @ self.weight.T + self.bias, self.noise_scale), 1)

    def posterior(self, x: Tensor) -> distributions.MultivariateNormal:
        r"""The exact posterior :math:`p(z \mid x)`.

        :param x: observations, ``[B, P]``.
        :return: a Gaussian of batch shape ``[B]`` and event shape ``[D]``.
        """
        variance = self.noise_scale.square()
        gram = self.weight.T @ self.weight
        identity = torch.eye(self.latent_dim, dtype=gram.dtype, device=gram.device)
        scaled_precision = gram + variance * identity
        mean = torch.linalg.solve(scaled_precision, self.weight.T @ (x - self.bias).T).T
        return distributions.MultivariateNormal(mean, precision_matrix=scaled_precision / variance)

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""The exact :math:`\log p(x)` in nats, ``[B, P] -> [B]``."""
        variance = self.noise_scale.square().expand(self.observation_dim)
        return distributions.LowRankMultivariateNormal(self.bias, self.weight, variance).log_prob(x)


class GaussianMixture(LatentVariableModel):
    r"""A scalar from a mixture of Gaussians, seen through Gaussian noise: all in closed form.

    .. math::

        z \sim \sum_{c=1}^{C} \pi_c\, \mathcal{N}(\mu_c, \sigma_c^2), \qquad
        x \mid z \sim \mathcal{N}(z, \sigma^2)

        p(x) = \sum_c \pi_c\, \mathcal{N}(x;\, \mu_c, \sigma_c^2 + \sigma^2), \qquad
        p(z \mid x) = \sum_c P(c \mid x)\, \mathcal{N}\Big(z;\,
        \frac{\sigma^2 \mu_c + \sigma_c^2 x}{\sigma_c^2 + \sigma^2},
        \frac{\sigma_c^2 \sigma^2}{\sigma_c^2 + \sigma^2}\Big)

    One component gives the Gaussian with unknown mean. Mixture weights are learned through logits,
    scales through logarithms.

    :param weights: :math:`\pi`, ``[C]``, positive; normalised here.
    :param means: :math:`\mu`, ``[C]``.
    :param scales: the standard deviations :math:`\sigma_c > 0`, ``[C]``.
    :param noise_scale: the standard deviation :math:`\sigma > 0`, a scalar.
    :raises ValueError: when shapes disagree, or a weight or a scale is not positive.

    >>> model = GaussianMixture(torch.ones(2), torch.tensor([-5.0, 5.0]), torch.ones(2), 10.0)
    >>> x = torch.tensor([[0.0], [10.0]])
    >>> model.posterior(x).mean, model.log_evidence(x)
    (tensor([[0.0000],
            [2.3674]], grad_fn=...), tensor([-3.3503, -3.7275], grad_fn=...))
    """

    def __init__(self, weights: Tensor, means: Tensor, scales: Tensor, noise_scale: float | Tensor):
        if means.ndim != 1 or weights.shape != means.shape or scales.shape != means.shape:
            raise ValueError(
                "weights, means and scales must all be [C]; got shapes "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(scales.shape)}"
            )
        noise_scale = torch.as_tensor(noise_scale, dtype=means.dtype, device=means.device)
        if noise_scale.ndim != 0:
            raise ValueError(f"noise_scale must be a scalar; got shape {tuple(noise_scale.shape)}")
        for name, value in (("weights", weights), ("scales", scales), ("noise_scale", noise_scale)):
            if not (value > 0).all():
                raise ValueError(f"{name} must be positive; got {value.tolist()}")
        super().__init__(latent_dim=1, observation_dim=1)
        self.logits = nn.Parameter(weights.detach().clone().log())
        self.means = nn.Parameter(means.detach().clone())
        self.log_scales = nn.Parameter(scales.detach().clone().log())
        self.log_noise_scale = nn.Parameter(noise_scale.detach().clone().log())

    def prior(self) -> distributions.MixtureSameFamily:
        """The mixture, of event shape ``[1]``; its ``mixture_distribution`` is that of c."""
        return _scalar_mixture(self.logits, self.means, self.log_scales.exp())

    def likelihood(self, z: Tensor) -> Distribution:
        r""":math:`\mathcal{N}(z, \sigma^2)` for latents ``[..., 1]``."""
        return Independent(Normal(z, self.log_noise_scale.exp()), 1)

    def evidence(self) -> distributions.MixtureSameFamily:
        """The marginal of the observation, p(x), as a distribution of event shape ``[1]``."""
        return _scalar_mixture(self.logits, self.means, self._marginal_scales())

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""The exact :math:`\log p(x)` in nats, ``[..., 1] -> [...]``."""
        return self.evidence().log_prob(x)

    def posterior(self, x: Tensor) -> distributions.MixtureSameFamily:
        r"""The exact posterior :math:`p(z \mid x)`, again a mixture.

        :param x: observations, ``[..., 1]``.
        :return: batch shape ``[...]`` and event shape ``[1]``; its ``mixture_distribution`` is
            :math:`P(c \mid x)` and its ``component_distribution`` is :math:`p(z \mid x, c)`.
        """
        marginal_scales = self._marginal_scales()
        share = (self.log_scales.exp() / marginal_scales).square()
        logits = self.logits + Normal(self.means, marginal_scales).log_prob(x)
        means = self.means + share * (x - self.means)
        scales = share.sqrt() * self.log_noise_scale.exp()
        return _scalar_mixture(logits, means, scales.expand_as(means))

    def _marginal_scales(self) -> Tensor:
        return torch.hypot(self.log_scales.exp(), self.log_noise_scale.exp())


def _scalar_mixture(
    logits: Tensor, means: Tensor, scales: Tensor
) -> distributions.MixtureSameFamily:
    components = Independent(Normal(means.unsqueeze(-1), scales.unsqueeze(-1)), 1)
    return distributions.MixtureSameFamily(Categorical(logits=logits), components)


class BernoulliDecoder(LatentVariableModel):
    r"""Binary observations whose logits are a neural network of a standard normal latent.

    .. math:: z \sim \mathcal{N}(0, I_D), \qquad
        x_p \mid z \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(f_\theta(z)_p))

    :param decoder: module that maps ``[N, D]`` to logits ``[N, P]``.
    :param latent_dim: D.
    :param observation_dim: P.

    >>> model = BernoulliDecoder(nn.Linear(2, 3), latent_dim=2, observation_dim=3)
    >>> model.log_joint(torch.ones(5, 3), torch.zeros(7, 5, 2)).shape
    torch.Size([7, 5])
    """

    def __init__(self, decoder: nn.Module, latent_dim: int, observation_dim: int):
        super().__init__(latent_dim, observation_dim)
        self.decoder = decoder

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the pixels: ``[..., D] -> [..., P]``."""
        flat = self.decoder(z.reshape(-1, self.latent_dim))
        return flat.reshape(*z.shape[:-1], self.observation_dim)

    def likelihood(self, z: Tensor) -> Distribution:
        """Independent Bernoulli pixels for latents ``[..., D]``; observations must be 0 or 1."""
        return Independent(Bernoulli(logits=self.logits(z)), 1)

    @torch.no_grad()
    def start_at_mean(self, images: Tensor) -> None:
        r"""Set the bias of the last layer to :math:`\mathrm{logit}` of the images' mean.

        Where the layer has one bias for all pixels, as a convolution has, the mean is over all of
        them; where it has one for each pixel, it is the mean of that pixel. Without this the first
        hundreds of updates learn no more than that most pixels are black.

        :param images: grey values or zeros and ones, ``[N, P]``.
        :raises ValueError: when a mean is 0 or 1, and has no finite logit.

        >>> model = BernoulliDecoder(nn.Linear(1, 2), latent_dim=1, observation_dim=2)
        >>> model.start_at_mean(torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]))
        >>> model.decoder.bias.sigmoid()
        tensor([0.2500, 0.7500], grad_fn=...)
        """
        layers = [m for m in self.decoder.modules() if getattr(m, "bias", None) is not None]
        bias = layers[-1].bias
        mean = images.mean() if bias.numel() == 1 else images.mean(0)
        if not ((mean > 0) & (mean < 1)).all():
            raise ValueError(
                f"the mean of each pixel must lie between 0 and 1; got {mean.min():g} to "
                f"{mean.max():g}. Give more images, or average them over pixels"
            )
        bias.copy_(mean.logit())


class ConvBernoulli(BernoulliDecoder):
    r"""The book's decoder of 28 x 28 binary images: small, convolutional, 311,861 parameters.

    D -> 500 -> 512 (ReLU), reshaped to 32 maps of 4 x 4, then three transposed convolutions
    (kernel 5, stride 2, padding 2) 32 -> 32 -> 16 -> 1 to sides 7, 14 and 28, ReLU between them.

    :param latent_dim: D, 32 in all of the book's tables.
    :param num_components: C. With one, the prior is :math:`\mathcal{N}(0, I_D)`; with more it is
        learned, a mixture :math:`\sum_c \pi_c\, \mathcal{N}(\mu_c, \mathrm{diag}\,\sigma_c^2)`.
        At the start weights are equal, scales one, and :math:`\mu_c` is the c-th unit vector.
    :raises ValueError: when there are more components than latent dimensions.

    Source: the "small convolutional decoder" of Li, Turner and Liu (2017); widths as in
    Salimans, Kingma and Welling (2015), an assumption where the talk is silent.

    >>> model = ConvBernoulli()
    >>> sum(p.numel() for p in model.parameters())
    311861
    >>> model.likelihood(torch.zeros(2, 32)).mean.shape
    torch.Size([2, 784])
    >>> ConvBernoulli(num_components=10).prior().log_prob(torch.zeros(32))
    tensor(-29.9060, grad_fn=...)
    """

    def __init__(self, latent_dim: int = 32, num_components: int = 1):
        check_counts(latent_dim=latent_dim, num_components=num_components)
        if num_components > latent_dim:
            raise ValueError(
                f"num_components = {num_components} is more than latent_dim = {latent_dim}"
            )
        decoder = nn.Sequential(
            nn.Linear(latent_dim, 500),
            nn.ReLU(),
            nn.Linear(500, 512),
            nn.ReLU(),
            nn.Unflatten(1, (32, 4, 4)),
            nn.ConvTranspose2d(32, 32, 5, stride=2, padding=2, output_padding=0),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 5, stride=2, padding=2, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 5, stride=2, padding=2, output_padding=1),
            nn.Flatten(),
        )
        super().__init__(decoder, latent_dim, observation_dim=784)
        self.num_components = num_components
        if num_components > 1:
            self.prior_logits = nn.Parameter(torch.zeros(num_components))
            self.prior_means = nn.Parameter(torch.eye(num_components, latent_dim))
            self.prior_log_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    def prior(self) -> Distribution:
        """The prior p(z): normal, or the mixture as it has been learned."""
        if self.num_components == 1:
            return super().prior()
        components = Independent(Normal(self.prior_means, self.prior_log_scales.exp()), 1)
        return distributions.MixtureSameFamily(Categorical(logits=self.prior_logits), components)


# --- hierarchies ---------------------------------------------------------------------------------


class AncestralGaussian(Distribution):
    r"""A Gaussian law of several levels, each conditional on those above it.

    .. math:: p(z) = \prod_{\ell = 1}^{L} \mathcal{N}\bigl(z^\ell;\ \mu^\ell(z^{>\ell}),\
        \mathrm{diag}\, \sigma^\ell(z^{>\ell})^2\bigr), \qquad z = (z^1, \dots, z^L)

    The levels stand side by side in one vector, the lowest (nearest to the data) first. Such are
    the *empirical prior* of a hierarchical model and the posterior of a ladder encoder.

    :param conditional: maps z, ``[..., D]``, to a Normal of all D coordinates, each given the
        levels above its own in z (and given nothing that is not above).
    :param sizes: dimensions of the levels, lowest first; they sum to D.
    :param like: a tensor of shape ``[*batch_shape, D]``, for device and dtype.

    >>> def conditional(z):  # z1 | z2 ~ N(2 z2, 1), z2 ~ N(0, 1)
    ...     return Normal(torch.cat([2 * z[..., 1:], torch.zeros_like(z[..., 1:])], -1), 1.0)
    >>> law = AncestralGaussian(conditional, (1, 1), torch.zeros(2))
    >>> law.log_prob(torch.tensor([2.0, 1.0])).item() == Normal(0.0, 1.0).log_prob(
    ...     torch.tensor([0.0, 1.0])).sum().item()
    True
    """

    arg_constraints = {}  # noqa: RUF012 - the interface of torch.distributions
    has_rsample = True

    def __init__(self, conditional: Conditional, sizes: tuple[int, ...], like: Tensor):
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=False)
        self.conditional, self.sizes, self._like = conditional, sizes, like

    def expand(self, batch_shape, _instance=None) -> Distribution:
        """The same law for each element of a batch of another shape, ``[*batch_shape, D]``."""
        like = self._like.expand(*batch_shape, -1)
        return AncestralGaussian(self.conditional, self.sizes, like)

    def rsample(self, sample_shape=()) -> Tensor:
        """Draws from the top level down, with their graph: ``[*sample_shape, *batch, D]``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self._like.dtype, device=self._like.device)
        return self.descend(noise)

    def descend(self, noise: Tensor) -> Tensor:
        r""":math:`z^\ell = \mu^\ell(z^{>\ell}) + \sigma^\ell(z^{>\ell})\, \varepsilon^\ell`, from
        the top. For ``noise = 0`` these are the means of the means.

        :param noise: :math:`\varepsilon`, ``[..., D]``.
        """
        levels = list(noise.split(self.sizes, -1))
        for level in reversed(range(len(levels))):
            normal = self.conditional(torch.cat(levels, -1))
            mean, scale = (p.split(self.sizes, -1)[level] for p in (normal.mean, normal.stddev))
            levels[level] = mean + scale * levels[level]
        return torch.cat(levels, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, ``[..., D] -> [...]``."""
        return self.conditional(value).log_prob(value).sum(-1)


def conditional_normal(law: Distribution, z: Tensor) -> Normal:
    r"""A Gaussian law as a Normal of each coordinate, given the levels above it in z.

    It is what closed-form divergences and prior errors need: for a law of one level the Normal is
    the law itself, whatever z.

    :param law: an ``Independent`` Normal, or an :class:`AncestralGaussian`.
    :param z: latents, ``[..., D]``.
    """
    return law.conditional(z) if isinstance(law, AncestralGaussian) else law.base_dist


class BagOfWords(Distribution):
    r"""A document as counts of its words, drawn one by one from one law.

    .. math:: \log p(x) = \sum_v x_v \log \mathrm{softmax}(f)_v

    This is the probability of the words in their order: the multinomial coefficient, which depends
    on no parameter, is left out, as perplexities do.

    :param logits: f, ``[..., P]``.

    >>> BagOfWords(torch.zeros(4)).log_prob(torch.tensor([2.0, 0.0, 1.0, 0.0]))  # -3 log 4
    tensor(-4.1589)
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, logits: Tensor):
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)
        self.log_probs = torch.log_softmax(logits, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats of counts ``[..., P]``."""
        return (value * self.log_probs).sum(-1)


def perceptron(num_inputs: int, num_hidden: int, num_layers: int, num_outputs: int) -> nn.Module:
    """Dense layers with exponential linear units between them.

    :param num_layers: hidden layers, each of width ``num_hidden``.

    >>> perceptron(2, 16, 2, 5)(torch.zeros(3, 2)).shape
    torch.Size([3, 5])
    """
    widths = [num_inputs, *num_layers * [num_hidden]]
    hidden = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ELU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], num_outputs))


class DeepLatentGaussian(LatentVariableModel):
    r"""A deep latent Gaussian model of one or more levels, for images, colour images or text.

    .. math:: z^L \sim \mathcal{N}(0, I), \qquad
        z^\ell \mid z^{\ell + 1} \sim \mathcal{N}\bigl(\mu_\theta(z^{\ell + 1}),\
        \mathrm{diag}\, \sigma_\theta(z^{\ell + 1})^2\bigr), \qquad x \mid z^1 \sim p_\theta

    All maps are :func:`perceptron`; scales go through
    :func:`amortised.encoders.bounded_log_scale`. The latent is the vector of all levels, the
    lowest first.

    :param latent_dims: dimensions of the levels, lowest first.
    :param observation_dim: P.
    :param observation: ``"binary"`` (Bernoulli pixels), ``"real"`` (Gaussian, with mean and scale
        from the network) or ``"counts"`` (:class:`BagOfWords`).
    :param num_hidden: width of every hidden layer.
    :param num_layers: hidden layers of every map.
    :raises ValueError: for another kind of observation or a number that is too small.

    Source: Marino, Yue and Mandt (2018); widths are free here, and there are no connections that
    skip a level.

    >>> model = DeepLatentGaussian((3, 2), 784, num_hidden=16)
    >>> model.log_joint(torch.ones(5, 784), model.prior().sample((7, 5))).shape
    torch.Size([7, 5])
    """

    def __init__(
        self,
        latent_dims: Sequence[int],
        observation_dim: int,
        observation: str = "binary",
        num_hidden: int = 256,
        num_layers: int = 2,
    ):
        if observation not in ("binary", "real", "counts"):
            raise ValueError(f"observation must be binary, real or counts; got {observation!r}")
        check_counts(num_hidden=num_hidden, num_layers=num_layers, levels=len(latent_dims))
        check_counts(**{f"latent_dims[{i}]": size for i, size in enumerate(latent_dims)})
        super().__init__(sum(latent_dims), observation_dim)
        self.latent_dims, self.observation = tuple(latent_dims), observation
        outputs = observation_dim * (2 if observation == "real" else 1)
        self.decoder = perceptron(latent_dims[0], num_hidden, num_layers, outputs)
        self.priors = nn.ModuleList(
            perceptron(above, num_hidden, num_layers, 2 * below)
            for below, above in pairwise(latent_dims)
        )

    def prior(self) -> Distribution:
        r""":math:`\mathcal{N}(0, I)` for one level; else an :class:`AncestralGaussian`."""
        if len(self.latent_dims) == 1:
            return super().prior()
        like = next(self.parameters()).new_zeros(self.latent_dim)
        return AncestralGaussian(self._conditional_prior, self.latent_dims, like)

    def _conditional_prior(self, z: Tensor) -> Normal:
        levels = z.split(self.latent_dims, -1)
        maps = zip(self.priors, levels[1:], strict=True)
        pairs = [network(above).chunk(2, -1) for network, above in maps]
        top = torch.zeros_like(levels[-1])
        means, raw = zip(*pairs, (top, top), strict=True)
        return Normal(torch.cat(means, -1), bounded_log_scale(torch.cat(raw, -1)).exp())

    def likelihood(self, z: Tensor) -> Distribution:
        """The law of the observation given the lowest level of ``z``, ``[..., D]``."""
        output = self.decoder(z[..., : self.latent_dims[0]])
        if self.observation == "counts":
            return BagOfWords(output)
        if self.observation == "binary":
            return Independent(Bernoulli(logits=output), 1)
        mean, raw = output.chunk(2, -1)
        return Independent(Normal(mean, bounded_log_scale(raw).exp()), 1)


# --- models of a reader's own --------------------------------------------------------------------

#: What a model states, and how; everything else follows from these.
PROTOCOL = {
    "latent_dim": "set it to the number D of latents",
    "observation_dim": "set it to the number P of values in an observation",
    "prior": "define prior(), a Distribution of event shape [D]",
    "likelihood": "define likelihood(z), for z [..., D] a Distribution of batch shape [...] and "
    "event shape [P]; or, where nothing is drawn, log_likelihood(x, z) of shape [...]",
}


class _Adapted(LatentVariableModel):
    """A model of another class, with what follows from its own methods."""

    def __init__(self, own: object):
        nn.Module.__init__(self)
        for name, part in ({"own": own} if isinstance(own, nn.Module) else vars(own)).items():
            if isinstance(part, nn.Module):  # so that weights and modes are seen
                self.add_module(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
        names = (*PROTOCOL, "log_likelihood", "log_joint", "sample")
        vars(self).update({name: getattr(own, name) for name in names if hasattr(own, name)})
        if not any(t.is_floating_point() for t in (*self.parameters(), *self.buffers())):
            with torch.random.fork_rng():
                self.register_buffer("drawn", self.prior().sample())


def as_model(model: object) -> LatentVariableModel:
    r"""A model of any class, with the methods that follow from those that it has.

    It has sizes ``latent_dim`` and ``observation_dim``, a ``prior()`` and a ``likelihood(z)``
    (:data:`PROTOCOL`), as a module or as a plain object. From these follow
    :math:`\log p(x \mid z)`, :math:`\log p(x, z)` and draws, unless it has ``log_likelihood``,
    ``log_joint`` or ``sample``.

    :param model: a :class:`LatentVariableModel` is returned as it is.
    :raises TypeError: when a piece is missing; it names all that are, each with its remedy.

    >>> as_model(nn.Linear(2, 3))
    Traceback (most recent call last):
        ...
    TypeError: a Linear is no model: no latent_dim (set it to the number D of latents), no ...
    """
    if isinstance(model, LatentVariableModel):
        return model
    told = {n: f"no {n} ({how})" for n, how in PROTOCOL.items() if not hasattr(model, n)}
    if hasattr(model, "log_likelihood"):
        told.pop("likelihood", None)
    if told:
        raise TypeError(f"a {type(model).__name__} is no model: {', '.join(told.values())}")
    return _Adapted(model)


def log_joint_fn(model: object) -> Callable[[Tensor, Tensor], Tensor]:
    """``(x, z) -> log p(x, z)`` of a model: its own, or that of :func:`as_model`.

    >>> log_joint_fn(LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0))(*torch.zeros(2, 1, 1))
    tensor([-1.8379], grad_fn=...)
    """
    return (model if hasattr(model, "log_joint") else as_model(model)).log_joint


def like(model: nn.Module) -> Tensor:
    """A tensor of a model's type and device: its first weight, if it has one.

    >>> like(nn.Linear(1, 1).double()).dtype
    torch.float64
    """
    tensors = chain(model.parameters(), model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def check_fixed(model: object) -> None:
    """Check that a model is one function: no layer of it is random or looks at the whole batch.

    :raises ValueError: for dropout or batch normalisation in training mode.

    >>> check_fixed(nn.Dropout())
    Traceback (most recent call last):
        ...
    ValueError: the model's Dropout is training; call model.eval()
    """
    found = [model] if isinstance(model, nn.Module) else vars(model).values()
    for part in chain(*(own.modules() for own in found if isinstance(own, nn.Module))):
        if part.training and isinstance(part, _RANDOM_IN_TRAINING):
            raise ValueError(f"the model's {type(part).__name__} is training; call model.eval()")


def check_model(
    model: object, x: Tensor | None = None, *, name: str = "x", grey: bool = False
) -> tuple[LatentVariableModel, Tensor]:
    """What every evaluation asks of a model and its observations, before any work.

    The model is tried on two observations and six draws of its prior: shapes, values, and whether
    these depend on what else is evaluated. The global stream is left as it was.

    :param model: of any class, see :func:`as_model`.
    :param x: observations, ``[N, P]``; by default draws of the model.
    :param name: of the observations, in messages.
    :param grey: whether a model of binary pixels is given grey values, to be binarised later.
    :return: the model, and the observations in its type.
    :raises TypeError: as :func:`as_model`.
    :raises ValueError: when something does not fit, with the remedy. Probabilities that are passed
        as logits can only be suspected; that is a warning.

    >>> check_model(LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0), torch.zeros(5, 3))
    Traceback (most recent call last):
        ...
    ValueError: x must be [N, 2], N at least 1; got (5, 3)
    """
    model = as_model(model)
    check_counts(latent_dim=model.latent_dim, observation_dim=model.observation_dim)
    check_fixed(model)
    _check_law("prior()", model.prior(), (), model.latent_dim)
    with seeded(0, like(model).device):
        x = model.sample(2)[0] if x is None else x
        z = model.prior().sample((3, 2))
    x = checked_observations(model, x, isinstance(model, BernoulliDecoder) and not grey, name)
    few = x[:2].expand(2, -1)
    _check_values(model, few.round() if isinstance(model, BernoulliDecoder) else few, z)
    return model, x


def checked_observations(
    model: LatentVariableModel, x: Tensor, is_binary: bool, name: str = "x"
) -> Tensor:
    """The observations in the type of the model's weights, whatever their own.

    :param x: ``[N, P]``, on the device of the model.
    :param is_binary: whether they must be zeros and ones.
    :param name: of the observations, in messages.
    :raises ValueError: when they are not.

    >>> checked_observations(BernoulliDecoder(nn.Linear(1, 2), 1, 2), torch.ones(1, 2).byte(), True)
    tensor([[1., 1.]])
    """
    size, device = model.observation_dim, like(model).device
    if x.ndim != 2 or x.shape[1] != size or not len(x):
        raise ValueError(f"{name} must be [N, {size}], N at least 1; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and the model on {device}; move one of them")
    if is_binary and not ((x == 0) | (x == 1)).all():
        raise ValueError(
            f"{name} must hold zeros and ones, not {x.min():g} to {x.max():g}; see data.binarise"
        )
    return x.to(like(model).dtype)


def _check_law(what: str, law: Distribution, batch: tuple[int, ...], size: int) -> None:
    if not isinstance(law, Distribution) or (law.batch_shape, law.event_shape) != (batch, (size,)):
        raise ValueError(
            f"{what} must be a Distribution of batch shape {list(batch)} and event shape [{size}]; "
            f"got {law!r:.90}. One law of all {size} values is Independent(..., 1)"
        )


@torch.no_grad()
def _check_values(model: LatentVariableModel, x: Tensor, z: Tensor) -> None:
    """Whether the likelihood of x, ``[2, P]``, at z, ``[3, 2, D]``, can be one."""
    is_stated = type(model).likelihood is not LatentVariableModel.likelihood
    try:
        law = model.likelihood(z) if is_stated or "likelihood" in vars(model) else None
        value, alone = model.log_likelihood(x, z), model.log_likelihood(x[:1], z[:, :1])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the likelihood fails at draws of the prior: {error}") from error
    if law is not None:
        _check_law("likelihood(z)", law, (3, 2), model.observation_dim)
    given = vars(getattr(law, "base_dist", law or model))
    logits = given.get("logits", torch.zeros(0))
    low, high = logits.aminmax() if logits.numel() >= 100 and "probs" not in given else (0, 0)
    if low > 0 and 0.5 < high - low < high < 1:  # not the nearly equal ones of an untrained decoder
        message = "all logits are between 0 and 1: are they probabilities? Give these as probs"
        warnings.warn(message, stacklevel=4)
    fault = None
    if value.shape != z.shape[:-1]:
        fault = f"has shape {list(value.shape)} for z {list(z.shape)}; sum over pixels alone"
    elif x.isfinite().all() and value.isnan().any():
        fault = "is nan at draws of the prior; mend the likelihood"
    elif law is None and ((x == 0) | (x == 1)).all() and (value > 0).any():
        fault = f"of zeros and ones is {value.max():g}, above 0, and no log-probability: use "
        fault += "logsigmoid of logits, or state a density as likelihood(z)"
    elif not torch.allclose(alone, value[:, :1], rtol=1e-3, atol=1e-3, equal_nan=True):
        fault = "is random, or depends on what else is evaluated; call model.eval()"
    if fault:
        raise ValueError(f"log_likelihood(x, z) {fault}")
