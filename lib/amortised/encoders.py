r"""Encoders: amortised approximations :math:`q_\phi(z \mid x)` of the posterior."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from .numerics import check_counts

LOG_SCALE_RANGE = (-8.0, 4.0)


def bounded_log_scale(raw: Tensor) -> Tensor:
    r"""Smooth increasing map of the real line onto the log-scales :math:`(-8, 4)`.

    .. math:: \log \sigma = -8 + 12\, \mathrm{sigmoid}(\tfrac{3}{8} u + \log 2)

    It sends 0 to 0 with slope 1, so a freshly initialised network starts at :math:`\sigma = 1`, and
    no standard deviation leaves :math:`(3.4 \cdot 10^{-4}, 54.6)`. Unlike a clamp it always has a
    gradient.

    :param raw: u, any shape.
    :return: log-standard-deviations of the same shape.

    >>> bounded_log_scale(torch.tensor([-100.0, 0.0, 100.0])).round(decimals=3).abs()
    tensor([8., 0., 4.])
    """
    low, high = LOG_SCALE_RANGE
    return low + (high - low) * torch.sigmoid(0.375 * raw + math.log(2.0))


def conv_trunk(num_features: int = 500, negative_slope: float = 0.0) -> nn.Sequential:
    r"""Features of a 28 x 28 image: the book's decoder reversed.

    Convolutions (kernel 5, stride 2, padding 2) 1 -> 16 -> 32 -> 32 to sides 14, 7 and 4, then a
    dense layer, each followed by a rectifier.

    :param num_features: width of the last layer.
    :param negative_slope: slope of the leaky rectifier for negative inputs; 0 is a plain ReLU.
    :return: module that maps ``[B, 784]`` to ``[B, num_features]``.

    >>> conv_trunk()(torch.zeros(2, 784)).shape
    torch.Size([2, 500])
    """

    def rectifier() -> nn.Module:
        return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()

    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        rectifier(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        rectifier(),
        nn.Conv2d(32, 32, 5, stride=2, padding=2),
        rectifier(),
        nn.Flatten(),
        nn.Linear(512, num_features),
        rectifier(),
    )


class ParallelPerceptrons(nn.Module):
    r"""Independent small networks, evaluated in one batched product.

    Each is a perceptron with tanh between its layers. They share no parameter, so the gradient of
    the sum of their losses trains every one of them as if it were alone: several seeds for little
    more than the time of one. Weights and biases start uniform on
    :math:`(-1, 1) / \sqrt{\text{inputs of the layer}}`.

    :param num_networks: S.
    :param sizes: width of the input, of each hidden layer, and of the output.
    :raises ValueError: when fewer than two sizes are given, or a number is smaller than 1.

    >>> networks = ParallelPerceptrons(3, 1, 16, 2)
    >>> networks(torch.zeros(3, 5, 1)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(self, num_networks: int, *sizes: int):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold those of the input and the output; got {sizes}")
        check_counts(num_networks=num_networks, **{f"sizes[{i}]": n for i, n in enumerate(sizes)})
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            for parameters, rows in ((self.weights, inputs), (self.biases, 1)):
                uniform = 2.0 * torch.rand(num_networks, rows, outputs) - 1.0
                parameters.append(nn.Parameter(uniform / math.sqrt(inputs)))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of every network at its own batch: ``[S, B, inputs] -> [S, B, outputs]``."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.tanh() if layer else x, weight)
        return x


class BlockPerceptrons(nn.Module):
    r"""Independent small networks, each for its own block of a batch.

    The batch is cut into S equal blocks of neighbours; network s of :class:`ParallelPerceptrons`
    sees block s alone. As the ``head`` of an encoder or a discriminator it makes S of them, which
    learn side by side from S copies of the data: several seeds at once, in code that knows of one.

    :param num_blocks: S.
    :param sizes: widths, as in :class:`ParallelPerceptrons`.

    >>> heads = BlockPerceptrons(3, 2, 16, 4)
    >>> heads(torch.zeros(7, 6, 2)).shape  # 7 samples, 3 blocks of 2 observations
    torch.Size([7, 6, 4])
    """

    def __init__(self, num_blocks: int, *sizes: int):
        super().__init__()
        self.networks, self.num_blocks = ParallelPerceptrons(num_blocks, *sizes), num_blocks

    def forward(self, h: Tensor) -> Tensor:
        """Outputs ``[..., B, outputs]`` for inputs ``[..., B, inputs]``, B a multiple of S.

        :raises ValueError: when the batch cannot be cut into S equal blocks.
        """
        size, rest = divmod(h.shape[-2], self.num_blocks)
        if rest:
            raise ValueError(f"a batch of {h.shape[-2]} has no {self.num_blocks} equal blocks")
        blocks = h.reshape(-1, self.num_blocks, size, h.shape[-1]).transpose(0, 1)
        out = self.networks(blocks.flatten(1, 2)).unflatten(1, (-1, size))
        return out.transpose(0, 1).reshape(*h.shape[:-1], -1)


class GaussianEncoder(nn.Module):
    r"""Mean-field Gaussian :math:`q_\phi(z \mid x) = \mathcal{N}(\mu_\phi(x), \mathrm{diag}\,
    \sigma_\phi(x)^2)`.

    Trunk, then one dense layer to :math:`2D` outputs: the means, and what
    :func:`bounded_log_scale` maps to log-standard-deviations.

    :param latent_dim: D.
    :param trunk: module that maps ``[B, P]`` to ``[B, num_features]``; by default
        :func:`conv_trunk` for 28 x 28 images.
    :param num_features: width of the trunk's output.

    >>> q = GaussianEncoder(latent_dim=32)(torch.zeros(5, 784))
    >>> q.batch_shape, q.event_shape
    (torch.Size([5]), torch.Size([32]))
    """

    def __init__(
        self, latent_dim: int = 32, trunk: nn.Module | None = None, num_features: int = 500
    ):
        super().__init__()
        self.latent_dim = latent_dim
        self.trunk = conv_trunk(num_features) if trunk is None else trunk
        self.head = nn.Linear(num_features, 2 * latent_dim)

    def forward(self, x: Tensor) -> Independent:
        """The distribution of ``z`` for each observation.

        :param x: observations, ``[B, P]``.
        :return: diagonal Gaussian of batch shape ``[B]`` and event shape ``[D]``.
        """
        mean, raw_scale = self.head(self.trunk(x)).chunk(2, dim=-1)
        return Independent(Normal(mean, bounded_log_scale(raw_scale).exp()), 1)


class MixtureEncoder(nn.Module):
    r"""A student with a density and several modes,
    :math:`q_\phi(z \mid x) = \sum_c w_c(x)\, \mathcal{N}(z; \mu_c(x), \mathrm{diag}\,
    \sigma_c(x)^2)`.

    Its draws have no gradient: it learns by rules that ask for the density.

    :param latent_dim: D.
    :param num_components: C.
    :param trunk: module that maps ``[B, P]`` to ``[B, num_features]``; by default
        :func:`conv_trunk` for 28 x 28 images.
    :param num_features: width of the trunk's output.

    >>> encoder = MixtureEncoder(2, 3, trunk=nn.Identity(), num_features=4)
    >>> q = encoder(torch.ones(5, 4))
    >>> q.sample((7,)).shape, q.has_rsample
    (torch.Size([7, 5, 2]), False)
    """

    def __init__(
        self,
        latent_dim: int = 32,
        num_components: int = 4,
        trunk: nn.Module | None = None,
        num_features: int = 500,
    ):
        super().__init__()
        self.latent_dim, self.num_components = latent_dim, num_components
        self.trunk = conv_trunk(num_features) if trunk is None else trunk
        self.head = nn.Linear(num_features, num_components * (1 + 2 * latent_dim))

    def forward(self, x: Tensor) -> MixtureSameFamily:
        """The distribution of ``z`` for each observation.

        :param x: observations, ``[B, P]``.
        :return: mixture of batch shape ``[B]`` and event shape ``[D]``.
        """
        logits, *parts = self.head(self.trunk(x)).split(
            [self.num_components, *2 * [self.num_components * self.latent_dim]], dim=-1
        )
        mean, raw_scale = (part.unflatten(-1, (self.num_components, -1)) for part in parts)
        components = Independent(Normal(mean, bounded_log_scale(raw_scale).exp()), 1)
        return MixtureSameFamily(Categorical(logits=logits), components)


class ImplicitEncoder(nn.Module):
    r"""A student that can be sampled, but whose density :math:`q_\phi(z \mid x)` nobody knows.

    .. math::

        \text{CNN-G}\!: \quad & z = \mathrm{MLP}([\mathrm{CNN}(x), \varepsilon]),
        && \varepsilon \sim \mathcal{N}(0, I) \\
        \text{CNN-B}\!: \quad & z = \mathrm{MLP}(\mathrm{CNN}(x) \odot \varepsilon),
        && \varepsilon_j \sim \mathrm{Bernoulli}(\tfrac12)

    The MLP has one hidden layer of rectifiers. Gaussian noise is concatenated to the features;
    Bernoulli noise multiplies them, is not rescaled, and stays on at test time: it is where the
    randomness of z comes from, unlike dropout. Noise is drawn from the global stream.

    :param latent_dim: D.
    :param noise: ``"gaussian"`` or ``"bernoulli"``.
    :param trunk: module that maps ``[B, P]`` to ``[B, num_features]``; by default
        :func:`conv_trunk` for 28 x 28 images.
    :param num_features: width of the trunk's output.
    :param num_hidden: width of the hidden layer.
    :param noise_dim: length of the Gaussian noise, D by default. Bernoulli noise has one value for
        each feature.
    :raises ValueError: for another kind of noise, or a ``noise_dim`` for Bernoulli noise.

    Source: Li, Turner and Liu (2017); the widths and the length of the noise are assumptions.

    >>> encoder = ImplicitEncoder(latent_dim=32, noise="bernoulli")
    >>> encoder(torch.zeros(5, 784)).shape, encoder(torch.zeros(5, 784), num_samples=8).shape
    (torch.Size([5, 32]), torch.Size([8, 5, 32]))
    """

    def __init__(
        self,
        latent_dim: int = 32,
        noise: str = "gaussian",
        trunk: nn.Module | None = None,
        num_features: int = 500,
        num_hidden: int = 500,
        noise_dim: int | None = None,
    ):
        super().__init__()
        if noise not in ("gaussian", "bernoulli"):
            raise ValueError(f"noise must be 'gaussian' or 'bernoulli'; got {noise!r}")
        if noise == "bernoulli" and noise_dim is not None:
            raise ValueError(
                f"leave out noise_dim={noise_dim}: Bernoulli noise has one value for each feature"
            )
        self.latent_dim, self.noise = latent_dim, noise
        self.noise_dim = num_features if noise == "bernoulli" else (noise_dim or latent_dim)
        self.trunk = conv_trunk(num_features) if trunk is None else trunk
        num_inputs = num_features + (self.noise_dim if noise == "gaussian" else 0)
        self.head = nn.Sequential(
            nn.Linear(num_inputs, num_hidden), nn.ReLU(), nn.Linear(num_hidden, latent_dim)
        )

    def forward(self, x: Tensor, num_samples: int | None = None) -> Tensor:
        """Draws of z with their graph. The trunk runs once, however many samples are asked for.

        :param x: observations, ``[B, P]``.
        :param num_samples: K independent draws for each observation; one draw by default.
        :return: ``[K, B, D]``, or ``[B, D]`` by default.
        :raises ValueError: when K is less than 1.
        """
        if num_samples is not None:
            check_counts(num_samples=num_samples)
        features = self.trunk(x)
        if num_samples is not None:
            features = features.expand(num_samples, *features.shape)
        if self.noise == "bernoulli":
            return self.head(features * torch.bernoulli(torch.full_like(features, 0.5)))
        noise = torch.randn_like(features[..., :1].expand(*features.shape[:-1], self.noise_dim))
        return self.head(torch.cat([features, noise], dim=-1))


@torch.no_grad()
def start_at_prior(encoder: ImplicitEncoder, x: Tensor, num_samples: int = 100) -> None:
    r"""Rescale the last layer of a student so that it starts at the scale of the prior.

    With :math:`m_d` and :math:`s_d` the mean and standard deviation of the draws :math:`z_d` over
    noise *and* images, the weights and bias of output d become

    .. math:: w_d \leftarrow w_d / s_d, \qquad b_d \leftarrow (b_d - m_d) / s_d,

    after which each coordinate has mean 0 and standard deviation 1. The usual initial weights give
    noise standard deviations of 0.05 (Gaussian noise) or 0.002 (Bernoulli noise): a student that
    starts as a point is told from any teacher at once, and a game may never recover.

    :param encoder: changed in place; the last layer of its ``head`` is linear.
    :param x: images of the kind that it will see, ``[B, P]``.
    :param num_samples: K draws for each; the moments are those of K B draws.
    :raises ValueError: when the last layer is not linear, or a coordinate does not vary.

    >>> encoder, x = ImplicitEncoder(2, trunk=nn.Identity(), num_features=3), torch.randn(50, 3)
    >>> start_at_prior(encoder, x)
    >>> bool((encoder(x, 1000).std((0, 1)) - 1).abs().max() < 0.05)
    True
    """
    last = encoder.head[-1] if isinstance(encoder.head, nn.Sequential) else encoder.head
    if not isinstance(last, nn.Linear):
        raise ValueError(f"the last layer must be nn.Linear to be rescaled; got {last}")
    z = encoder(x, num_samples).flatten(0, 1)
    mean, scale = z.mean(0), z.std(0)
    if not (scale > 0).all():
        raise ValueError(
            f"coordinates {(scale <= 0).nonzero().flatten().tolist()} of z do not vary over the "
            f"noise and these {len(x)} images; use initial weights that are not zero"
        )
    last.weight.div_(scale.unsqueeze(1))
    last.bias.sub_(mean).div_(scale)
