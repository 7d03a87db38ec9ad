"""Log-space scalars and gradients: the few numerical primitives everything else is built on."""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, so that no value can be looked at now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def all_finite(x: Tensor) -> bool:
    """Whether no entry is infinite or ``nan``; taken for granted while a CUDA graph is captured.

    >>> all_finite(torch.ones(2)), all_finite(torch.tensor([1.0, torch.inf]))
    (True, False)
    """
    return is_capturing() or bool(torch.isfinite(x).all())


@contextlib.contextmanager
def argument_validation(enabled: bool) -> Iterator[None]:
    """Whether distributions check their arguments meanwhile; afterwards all is as before.

    The checks look at values, which the capture of a CUDA graph forbids.

    :param enabled: ``False`` turns them off; ``True`` leaves them as they are.

    >>> from torch.distributions import Bernoulli
    >>> with argument_validation(False):
    ...     Bernoulli(probs=torch.tensor(0.5)).log_prob(torch.tensor(0.5))
    tensor(-0.6931)
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(enabled and before)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global streams for a while, and put them back.

    :param seed: of the streams of the CPU and of ``device``, from 0 to :math:`2^{63} - 1`.
    :param device: where else numbers are drawn meanwhile.
    :raises ValueError: for another seed.

    >>> with seeded(0, torch.device("cpu")):
    ...     torch.rand(2)
    tensor([0.4963, 0.7682])
    """
    check_seed(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_counts(*, minimum: int = 1, **counts: object) -> None:
    """Check that numbers of things (samples, steps, dimensions) are whole and large enough.

    :param minimum: the least that is accepted.
    :param counts: each number under its name; ``True`` is none.
    :raises ValueError: for the first that is no integer or is less than ``minimum``.

    >>> check_counts(num_samples=10, num_chains=1)
    >>> check_counts(num_samples=10, num_chains=0)
    Traceback (most recent call last):
        ...
    ValueError: num_chains must be an integer, at least 1; got 0
    """
    for name, count in counts.items():
        is_integer = isinstance(count, numbers.Integral) and not isinstance(count, bool)
        if not is_integer or count < minimum:
            raise ValueError(f"{name} must be an integer, at least {minimum}; got {count!r}")


def check_seed(seed: object) -> None:
    """Check that a seed is one that every stream of random numbers takes as it is.

    :raises ValueError: unless it is an integer from 0 to :math:`2^{63} - 1`.

    >>> check_seed(-1)
    Traceback (most recent call last):
        ...
    ValueError: seed must be an integer, at least 0; got -1
    """
    check_counts(minimum=0, seed=seed)
    if seed >= 2**63:
        raise ValueError(f"seed must be less than 2**63; got {seed}")


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    r"""Logarithm of the arithmetic mean of exponentials, without overflow.

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} \exp(x_k)

    The order matters for bounds: the mean is taken *inside* the logarithm. A value of ``-inf``
    counts as a zero weight and stays in the mean; a ``nan`` propagates.

    :param x: log-values, any shape, in nats.
    :param dim: the dimension that is averaged, of length K.
    :return: ``x.shape`` without ``dim``, in nats.
    :raises ValueError: when ``dim`` is empty.

    >>> log_mean_exp(torch.tensor([0.0, -torch.inf]), dim=0)
    tensor(-0.6931)
    """
    if x.shape[dim] == 0:
        raise ValueError(f"log_mean_exp: no value along dim={dim} of shape {tuple(x.shape)}")
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Effective sample size of importance weights (Kish).

    .. math:: \mathrm{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2} = \frac{1}{\sum_k \bar w_k^2}

    It lies in :math:`[1, K]`, and it is blind to modes that no sample has found. Where every weight
    is zero no sample counts, and the value is 0.

    :param log_weights: unnormalised log-weights in nats, any shape.
    :param dim: the dimension of the K samples.
    :return: ``log_weights.shape`` without ``dim``, in samples.

    >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf]))
    tensor(2.)
    """
    ess = 1.0 / torch.softmax(log_weights, dim).square().sum(dim)
    all_zero = (log_weights == -torch.inf).all(dim)
    return torch.where(all_zero, torch.zeros_like(ess), ess)


def value_and_grad(
    logdensity_fn: Callable[[Tensor], Tensor], z: Tensor, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Value of a batched scalar function and its gradient in ``z``.

    The function acts on each point separately, so the gradient of the sum over points is the stack
    of the gradients :math:`\nabla_z f(z_i)`, and one backward pass gives all of them. It is taken
    also where gradients are off, inside ``torch.no_grad`` and ``torch.inference_mode``.

    :param logdensity_fn: maps ``[..., D]`` to ``[...]``.
    :param z: points, ``[..., D]``.
    :param create_graph: keep the graph, so that the gradient can itself be differentiated (a flow
        trained through its leapfrog steps needs that). By default both results are detached.
    :return: values ``[...]`` and gradients ``[..., D]``.
    :raises ValueError: when the function does not return one value per point, or z is an integer.

    >>> value_and_grad(lambda z: -0.5 * z.square().sum(-1), torch.tensor([[1.0, 2.0]]))
    (tensor([-2.5000]), tensor([[-1., -2.]]))
    """
    if not z.is_floating_point():
        raise ValueError(f"a gradient needs floating-point positions; got z of {z.dtype}")
    is_off = torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if is_off else contextlib.nullcontext(), torch.enable_grad():
        if not (create_graph and z.requires_grad):
            z = (z.clone() if z.is_inference() else z.detach()).requires_grad_(True)
        value = logdensity_fn(z)
        if value.shape != z.shape[:-1]:
            shapes = f"for z of shape {tuple(z.shape)} it returned {tuple(value.shape)}"
            raise ValueError(f"a log-density must map [..., D] to [...]: {shapes}")
        (grad,) = torch.autograd.grad(value.sum(), z, create_graph=create_graph)
    return (value, grad) if create_graph else (value.detach(), grad)


class CallCounter:
    """Wrap a function of ``z`` and count how often, and at how many points, it is evaluated.

    Wall time depends on the machine; the number of density (and hence gradient) evaluations does
    not, so it is the unit of cost throughout the book.

    :param fn: maps ``[..., D]`` to ``[...]``.

    >>> f = CallCounter(lambda z: z.sum(-1))
    >>> _ = f(torch.zeros(5, 2)), f(torch.zeros(3, 2))
    >>> f.calls, f.points
    (2, 8)
    """

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        self.fn = fn
        self.calls = 0
        self.points = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        self.points += math.prod(z.shape[:-1])
        return self.fn(z)
