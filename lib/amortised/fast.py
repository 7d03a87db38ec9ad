r"""The log-likelihood of a convolutional Bernoulli decoder and its gradient in z, faster.

Annealing evaluates :math:`\log p(x \mid z)` and :math:`\nabla_z \log p(x \mid z)` millions of times
while the weights stand still. Autograd pays each time for generality: it records a graph, and calls
transposed convolutions that processors run slowly. Here the chain rule is written out for the
layers of such decoders, and each layer takes the form that the processor runs best. All routes give
the numbers of autograd, up to rounding.

**A transposed convolution is a convolution.** With stride s, kernel k and padding p, input i
reaches output :math:`o = s i - p + t` through tap t. Cut the output into blocks of s pixels,
:math:`o = s q + r`. Every block then depends on the same few neighbours of input q, through taps
:math:`t = r + p - s (i - q)`: an ordinary convolution that computes the s x s pixels of a block as
channels (Shi et al., 2016). With k = 5, s = 2, p = 2 it has a 3 x 3 kernel. The backward pass is an
ordinary convolution already, with stride s and the original kernel.

**Or it is a matrix.** Unrolled, a transposed convolution is a dense matrix that is mostly zeros.
It multiplies several times as much and still wins on a GPU, whose matrix units run at full speed.

Source: Shi et al. (2016), arXiv 1609.07009, for the convolution over blocks.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import BernoulliDecoder, LatentVariableModel
from .numerics import argument_validation, is_capturing, value_and_grad
from .side_by_side import BlockDecoder

__all__ = ["ROUTES", "LogLikelihoodAndGrad", "RefreshedLikelihood", "log_likelihood_and_grad"]

ROUTES = ("auto", "eager", "rewritten", "compiled", "dense")
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_VECTOR_WIDTH = 16  # float32 values in the widest register of common processors
_FEWEST_ROWS = 16  # products of fewer rows are computed by other kernels, which round otherwise


def log_likelihood_and_grad(
    model: LatentVariableModel,
    x: Tensor,
    route: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> LogLikelihoodAndGrad:
    r"""A callable for :math:`\log p(x \mid z)` and :math:`\nabla_z \log p(x \mid z)` at fixed x.

    The routes, equal up to rounding:

    ``eager``
        autograd through the model. Any :class:`~amortised.models.LatentVariableModel`.
    ``rewritten``
        the chain rule written out, transposed convolutions as convolutions over blocks, channels
        last, pixels left in blocks, chains in chunks that fit the cache. No compiler needed.
    ``compiled``
        the same through ``torch.compile``: a few per cent faster, for some seconds at first use.
        Where that is not possible, ``rewritten``, with one warning.
    ``dense``
        transposed convolutions unrolled to dense matrices; on CUDA inside a CUDA graph.
    ``auto``
        ``dense`` on CUDA, else ``rewritten``; ``eager`` for a model that they do not cover.

    Routes other than ``eager`` cover :class:`~amortised.models.BernoulliDecoder` with a decoder
    built as ``nn.Sequential`` of ``Linear``, ``ReLU``, ``Unflatten``, ``ConvTranspose2d`` and
    ``Flatten``. Of a :class:`~amortised.side_by_side.BlockDecoder`, ``dense`` runs all members in
    one batched product a layer, with one chain for each observation; the others do not cover it.

    **Low precision.** ``dtype=torch.bfloat16`` (or float16) stores weights and activations in that
    type; positions, momenta and the sum over pixels stay in the model's type. It is for the
    *dynamics*. Leapfrog is reversible and preserves volume under any deterministic force, so the
    force need not be an exact gradient: only the energies that decide acceptance and weights must
    be exact. :meth:`LogLikelihoodAndGrad.log_likelihood` gives them in the model's type, one
    forward pass per temperature::

        fast_fn = log_likelihood_and_grad(model, x, dtype=torch.bfloat16)
        ais(log_prior_fn, fast_fn.log_likelihood, z0, schedule, step_size=..., num_leapfrog=...,
            likelihood_value_and_grad=fast_fn, exact_energies=True)

    Without ``exact_energies`` the energies are of low precision too. That estimates the evidence of
    a slightly different model, and a table that uses it says so. On the book's trained decoder the
    mean energy moves by less than 0.01 nat, and one chain's by about 0.01 (float16) or 0.1
    (bfloat16).

    On CUDA, PyTorch lets convolutions round to TF32 unless ``torch.backends.cudnn.allow_tf32`` is
    off; ``dense`` has only matrix products, which it does not round unless asked to.

    :param model: the model; evaluated where its weights are.
    :param x: observations, ``[B, P]``; binary for a ``BernoulliDecoder``.
    :param route: one of the names above.
    :param dtype: type of weights and activations; by default the model's own.
    :param chunk_size: chains evaluated at once, which bounds the memory beyond inputs and results.
        No chunk is cut below 16 chains, so that the limit does not change how products round. By
        default 256 per processor thread on a CPU and 65,536 on other devices.
    :return: a callable ``z -> (log_likelihood, grad)`` for z of shape ``[..., B, D]``.
    :raises ValueError: when the route is unknown or does not cover the model, when x is not
        binary or not ``[B, P]``, or when another argument is out of range.

    >>> from amortised.models import ConvBernoulli
    >>> generator = torch.Generator().manual_seed(0)
    >>> model, x = ConvBernoulli(), torch.bernoulli(torch.full((3, 784), 0.2), generator=generator)
    >>> value_and_grad_fn = log_likelihood_and_grad(model, x)
    >>> log_likelihood, grad = value_and_grad_fn(torch.randn(7, 3, 32, generator=generator))
    >>> value_and_grad_fn.route, log_likelihood.shape, grad.shape
    ('rewritten', torch.Size([7, 3]), torch.Size([7, 3, 32]))
    """
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}; got {route!r}")
    own_dtype = next(model.parameters()).dtype
    if dtype not in (None, own_dtype, *_LOW_PRECISION):
        raise ValueError(f"dtype must be {own_dtype}, bfloat16 or float16; got {dtype}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer, at least 1; got {chunk_size!r}")
    return LogLikelihoodAndGrad(model, x, route, dtype or own_dtype, chunk_size)


class LogLikelihoodAndGrad:
    r"""What :func:`log_likelihood_and_grad` returns: call it with z, ``[..., B, D]``.

    Gives :math:`\log p(x \mid z)`, ``[..., B]`` in nats, and its gradient in z, ``[..., B, D]``,
    both detached. Where x holds one observation, z may have any leading shape.

    The observations are fixed, and the routes work on a packed copy of the weights, until
    :meth:`refresh`. Changes of the weights that PyTorch counts (optimiser steps,
    ``load_state_dict``, in-place operations) are noticed at the next call and raise an error rather
    than give stale numbers.

    :ivar route: the route that is in use, never ``"auto"``.
    :ivar dtype: type of weights and activations.
    :ivar chunk_size: chains evaluated at once.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: LatentVariableModel,
        x: Tensor,
        route: str,
        dtype: torch.dtype,
        chunk_size: int | None,
    ):
        weight = next(model.parameters())
        self._model = model
        self._own_dtype, self._device = weight.dtype, weight.device
        if chunk_size is None:
            on_cpu = self._device.type == "cpu"
            chunk_size = 256 * torch.get_num_threads() if on_cpu else 65_536
        self.dtype, self.chunk_size = dtype, chunk_size
        self.route = route
        if route == "auto":
            self.route = "dense" if self._device.type == "cuda" else "rewritten"

        network = None
        if self.route != "eager":
            try:
                network = _network(model, dense=self.route == "dense")
            except ValueError:
                if route != "auto":
                    raise
                self.route = "eager"
        if network is None and dtype is not self._own_dtype:
            raise ValueError(f"the eager route runs in the model's own type; got dtype={dtype}")

        self._order = slice(None) if network is None else network.order.to(self._device)
        self._observe(x)
        if network is None:
            self._pack, self._packed = None, []
            self._value, self._value_and_grad = _autograd(model)
        else:
            self._run_network(network)
        self._versions = self._weight_versions()

    def _observe(self, x: Tensor) -> None:
        """Check x, and keep what the likelihood needs of it: for pixels, the signs ``2 x - 1``."""
        observation_dim = self._model.observation_dim
        if x.ndim != 2 or x.shape[1] != observation_dim or len(x) == 0:
            raise ValueError(
                f"x must be [B, P] with P = {observation_dim} and B at least 1; "
                f"got shape {tuple(x.shape)}"
            )
        is_bernoulli = isinstance(self._model, BernoulliDecoder)
        if is_bernoulli and not is_capturing() and not ((x == 0) | (x == 1)).all():
            raise ValueError("x must be binary, 0 or 1; binarise the images first")
        x = x.to(self._device, self._own_dtype)
        self._data = (2.0 * x - 1.0)[:, self._order] if _is_bernoulli(self._model) else x.clone()

    def _run_network(self, network: _Network) -> None:
        """Pack the weights, once for each type, and choose the function that runs them."""
        self._pack = network.pack
        self._packed = [
            [tuple(w.to(t) for w in weights) for weights in network.pack()]
            for t in dict.fromkeys((self._own_dtype, self.dtype))
        ]
        exact, forces = self._packed[0], self._packed[-1]
        run = None
        if self.route == "compiled":
            num_chains = max(_FEWEST_ROWS, self.chunk_size)
            z = self._data.new_zeros(num_chains, self._model.latent_dim)
            run = _compile(network.stages, forces, z, self._data[:1].repeat(num_chains, 1))
            self.route = "compiled" if run else "rewritten"
        run = run or functools.partial(_value_and_grad, network.stages)
        if self.route == "dense" and self._device.type == "cuda":
            run = _CudaGraphs(run)
        self._value = functools.partial(_value, network.stages, exact)
        self._value_and_grad = functools.partial(run, forces)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood and gradient, ``[..., B, D] -> ([..., B], [..., B, D])``.

        :raises ValueError: when the shape, type or device of z does not fit the model and x.
        :raises RuntimeError: when the weights changed since the last :meth:`refresh`.
        """
        value, grad = z.new_empty(z.shape[:-1]), z.new_empty(z.shape)
        flat_value, flat_grad = value.view(-1), grad.view(-1, z.shape[-1])
        for part, z_part, rows in self._chunks(z):
            results = self._value_and_grad(z_part, self._data[rows])
            flat_value[part], flat_grad[part] = results
        return value, grad

    @torch.inference_mode(False)
    @torch.no_grad()
    def log_likelihood(self, z: Tensor) -> Tensor:
        """The log-likelihood alone, in the model's own type whatever ``dtype``: ``[..., B]``.

        Arguments and errors as in a call.
        """
        value = z.new_empty(z.shape[:-1])
        flat_value = value.view(-1)
        for part, z_part, rows in self._chunks(z):
            flat_value[part] = self._value(z_part, self._data[rows])
        return value

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, x: Tensor | None = None) -> LogLikelihoodAndGrad:
        """Take the model's weights as they are now and, where given, other observations.

        In training this costs less than a new callable: captured CUDA graphs stay in use.

        :param x: the next minibatch, ``[B, P]``; B may differ from before.
        :return: the callable itself.
        :raises ValueError: when x is not binary or not ``[B, P]``.
        """
        if x is not None:
            self._observe(x)
        if self._pack is not None:
            fresh = self._pack()
            for packed in self._packed:  # in place, where captured graphs read them
                for old, new in zip(itertools.chain(*packed), itertools.chain(*fresh), strict=True):
                    old.copy_(new)
        self._versions = self._weight_versions()
        return self

    def _weight_versions(self) -> list[tuple[int, int]]:
        weights = itertools.chain(self._model.parameters(), self._model.buffers())
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]

    def _chunks(self, z: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Check z, and cut the flattened chains into nearly equal chunks.

        Yields where the chunk is, its chains, and which row of x belongs to each chain.
        """
        latent_dim, num_images = self._model.latent_dim, len(self._data)
        if z.shape[-1:] != (latent_dim,) or (num_images > 1 and z.shape[-2:-1] != (num_images,)):
            raise ValueError(
                f"z must be [..., B, D] with B = {num_images} and D = {latent_dim}; "
                f"got shape {tuple(z.shape)}"
            )
        if z.dtype != self._own_dtype or z.device != self._device:
            raise ValueError(
                f"z must be {self._own_dtype} on {self._device}, like the model's weights; "
                f"got {z.dtype} on {z.device}"
            )
        if self._versions != self._weight_versions():
            raise RuntimeError(
                "the model's weights changed since this callable packed them; call its refresh()"
            )
        flat = z.detach().reshape(-1, latent_dim)
        if isinstance(self._model, BlockDecoder) and self._pack is not None:
            if len(flat) > num_images:  # the blocks of rows would be torn apart
                raise ValueError(
                    "models side by side take one chain for each observation on this route; got "
                    f"{len(flat) // num_images} (use route='eager')"
                )
            yield slice(None), flat, torch.arange(num_images, device=z.device)
            return
        num_chunks = math.ceil(len(flat) / self.chunk_size)
        num_chunks = min(num_chunks, max(1, len(flat) // _FEWEST_ROWS))
        for i in range(num_chunks):
            start, stop = i * len(flat) // num_chunks, (i + 1) * len(flat) // num_chunks
            rows = torch.arange(start, stop, device=z.device) % num_images
            yield slice(start, stop), flat[start:stop], rows


class RefreshedLikelihood:
    """The likelihood of a model under training, for each minibatch: x to a callable of z.

    The callable is made once and then refreshed, so that packed weights and captured graphs stay in
    use. It is the ``route`` of :func:`amortised.amc.teacher_chain`.

    :param model: the model; its weights are taken as they are at each call.
    :param settings: of :func:`log_likelihood_and_grad`.

    >>> from amortised.models import ConvBernoulli
    >>> route = RefreshedLikelihood(ConvBernoulli())
    >>> route(torch.zeros(3, 784)) is route(torch.ones(5, 784))
    True
    """

    def __init__(self, model: LatentVariableModel, **settings: object):
        self.model, self.settings = model, settings
        self._likelihood: LogLikelihoodAndGrad | None = None

    def __call__(self, x: Tensor) -> LogLikelihoodAndGrad:
        if self._likelihood is None:
            self._likelihood = log_likelihood_and_grad(self.model, x, **self.settings)
            return self._likelihood
        return self._likelihood.refresh(x)


# --- autograd ------------------------------------------------------------------------------------


def _is_bernoulli(model: LatentVariableModel) -> bool:
    """Whether the likelihood is one that we know, not overridden by a subclass."""
    known = BlockDecoder if isinstance(model, BlockDecoder) else BernoulliDecoder
    return isinstance(model, known) and all(
        getattr(type(model), name) is getattr(known, name)
        for name in ("logits", "likelihood", "log_likelihood")
    )


def _autograd(model: LatentVariableModel) -> tuple[Callable, Callable]:
    """The log-likelihood, without and with its gradient, through the model itself."""
    # Through the logits, a trajectory that diverged has log-likelihood nan, which a sampler
    # rejects; the distribution's own checks would raise an error, and cost time.
    if _is_bernoulli(model):

        def value(z: Tensor, signs: Tensor) -> Tensor:
            return F.logsigmoid(model.logits(z) * signs).sum(-1)
    else:

        def value(z: Tensor, x: Tensor) -> Tensor:
            return model.log_likelihood(x, z)

    return value, lambda z, data: value_and_grad(lambda z: value(z, data), z)


# --- the chain rule, written out -----------------------------------------------------------------


class _Affine(NamedTuple):
    """``activation(a W' + b)``; its weights are W ``[out, in]`` and b."""

    relu: bool


class _BlockAffine(NamedTuple):
    """The same for S networks, each with its own block of rows; W is ``[S, out, in]``."""

    relu: bool


class _Blocks(NamedTuple):
    """A transposed convolution as a convolution over blocks, on flattened channels-last images.

    Its weights are those of the forward convolution, its bias, and those of the backward one.
    """

    relu: bool
    in_shape: tuple[int, int, int]  # channels, height, width
    out_shape: tuple[int, int, int]
    stride: int
    padding: int
    block: int  # side of a block of output pixels, which the forward convolution makes as channels
    window: tuple[int, int]  # first and last input that a block depends on, relative to its own
    keep_blocks: bool  # leave the pixels as [block rows, block columns, rows, columns, channels]

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.out_shape[1] // self.block), -(-self.out_shape[2] // self.block)


_Stage = _Affine | _BlockAffine | _Blocks


def _value_and_grad(
    stages: tuple[_Stage, ...], weights: list, z: Tensor, signs: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-likelihood and gradient for z ``[N, D]`` and pixels ``2 x - 1``, ``[N, P]``."""
    activations = _forward(stages, weights, z)
    margins = activations[-1].to(signs.dtype) * signs
    value = F.logsigmoid(margins).sum(-1)
    grad = torch.sigmoid(margins.neg_()).mul_(signs).to(activations[-1].dtype)
    for i in range(len(stages) - 1, -1, -1):
        if stages[i].relu:
            grad = torch.ops.aten.threshold_backward(grad, activations[i], 0)
        grad = _backward(stages[i], weights[i], grad)
    return value, grad.to(z.dtype)


def _value(stages: tuple[_Stage, ...], weights: list, z: Tensor, signs: Tensor) -> Tensor:
    logits = _forward(stages, weights, z)[-1].to(signs.dtype)
    return F.logsigmoid(logits.mul_(signs)).sum(-1)


def _forward(stages: tuple[_Stage, ...], weights: list, z: Tensor) -> list[Tensor]:
    """The output of each stage, flattened to ``[N, features]``."""
    outputs, a = [], z.to(weights[0][0].dtype)
    for stage, packed in zip(stages, weights, strict=True):
        if isinstance(stage, _Blocks):
            a = _forward_blocks(stage, packed, a)
        else:
            if isinstance(stage, _Affine):
                a = F.linear(a, *packed)
            else:
                weight, bias = packed
                blocks = a.view(len(weight), -1, a.shape[-1])
                a = torch.baddbmm(bias.unsqueeze(1), blocks, weight.mT).flatten(0, 1)
            a = a.relu_() if stage.relu else a
        outputs.append(a)
    return outputs


def _forward_blocks(stage: _Blocks, packed: tuple[Tensor, Tensor, Tensor], a: Tensor) -> Tensor:
    channels, *sides = stage.in_shape
    image = a.view(-1, *sides, channels).permute(0, 3, 1, 2)
    window_stride, (first, last) = stage.block // stage.stride, stage.window
    before = -first
    after = [
        window_stride * (b - 1) + last - (n - 1)
        for b, n in zip(stage.num_blocks, sides, strict=True)
    ]
    if before < max(0, *after):
        image, before = F.pad(image, (before, after[1], before, after[0])), 0
    y = F.conv2d(image, packed[0], packed[1], window_stride, before).permute(0, 2, 3, 1)
    rows, columns = stage.num_blocks
    y = y[:, :rows, :columns]
    y = y.relu_() if stage.relu else y
    if not stage.keep_blocks:
        channels, height, width = stage.out_shape
        y = y.reshape(-1, rows, columns, stage.block, stage.block, channels).transpose(2, 3)
        y = y.reshape(-1, rows * stage.block, columns * stage.block, channels)[:, :height, :width]
    return y.reshape(len(a), -1)


def _backward(stage: _Stage, packed: tuple[Tensor, ...], grad: Tensor) -> Tensor:
    """From the gradient in a stage's output, before activation, to that in its input."""
    if isinstance(stage, _Affine):
        return grad @ packed[0]
    if isinstance(stage, _BlockAffine):
        return (grad.view(len(packed[0]), -1, grad.shape[-1]) @ packed[0]).flatten(0, 1)
    channels, height, width = stage.out_shape
    if stage.keep_blocks:
        blocks = grad.view(-1, *stage.num_blocks, stage.block, stage.block, channels)
        grad = blocks.transpose(2, 3)
    image = grad.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    image = F.conv2d(image, packed[2], None, stage.stride, stage.padding)
    return image.permute(0, 2, 3, 1).reshape(len(grad), -1)


# --- from modules to stages ----------------------------------------------------------------------


class _Layer(NamedTuple):
    """A layer with weights, the shapes of one example before and after, and what follows it."""

    module: nn.Linear | nn.ConvTranspose2d
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    relu: bool


class _Network(NamedTuple):
    """Stages, the order in which they leave the pixels, and a function that packs the weights."""

    stages: tuple[_Stage, ...]
    order: Tensor
    pack: Callable[[], list[tuple[Tensor, ...]]]


def _network(model: LatentVariableModel, dense: bool) -> _Network:
    """Stages for a model; a ``ValueError`` says what is not covered."""
    if not _is_bernoulli(model):
        raise ValueError(
            f"only a BernoulliDecoder has routes other than 'eager'; got {type(model).__name__}"
        )
    if not isinstance(model, BlockDecoder):
        return _dense_network(_layers(model)) if dense else _rewritten_network(_layers(model))
    if not dense:
        raise ValueError("models side by side have the routes 'dense' and 'eager'")
    return _side_by_side_network([_dense_network(_layers(decoder)) for decoder in model.decoder])


def _layers(model: BernoulliDecoder) -> list[_Layer]:
    layers: list[_Layer] = []
    shape: tuple[int, ...] = (model.latent_dim,)
    for module in _flatten(model.decoder):
        kind, in_shape = type(module), shape
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"only the 'eager' route runs hooks; {module} has some")
        if kind is nn.ReLU and layers:
            layers[-1] = layers[-1]._replace(relu=True)
        elif kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            shape = (math.prod(shape),)
        elif kind is nn.Unflatten and module.dim in (1, -1) and len(module.unflattened_size) == 3:
            shape = tuple(module.unflattened_size)
        elif (kind is nn.Linear and len(shape) == 1) or (
            kind is nn.ConvTranspose2d and len(shape) == 3
        ):
            shape = tuple(module(module.weight.new_zeros(1, *shape)).shape[1:])
            layers.append(_Layer(module, in_shape, shape, relu=False))
        else:
            raise ValueError(
                f"only the 'eager' route covers a decoder with {module} at shape {shape}"
            )
    return layers


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of nested ``nn.Sequential`` in the order of use, repeated where reused."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flatten(child)
    else:
        yield module


def _dense_network(layers: list[_Layer]) -> _Network:
    """Every layer an affine map of flattened activations, in the model's own order."""

    def pack(layer: _Layer) -> tuple[Tensor, Tensor]:
        module = layer.module
        bias = module(module.weight.new_zeros(1, *layer.in_shape)).detach().flatten()
        if isinstance(module, nn.Linear):
            return module.weight.detach().clone(), bias
        inputs = math.prod(layer.in_shape)
        basis = torch.eye(inputs, dtype=bias.dtype, device=bias.device)
        # Exact in float32: CUDA would else be free to round a convolution to TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            images = F.conv_transpose2d(
                basis.view(inputs, *layer.in_shape),
                module.weight.detach(),
                None,
                module.stride,
                module.padding,
                module.output_padding,
                module.groups,
                module.dilation,
            )
        # A weight that is stored channels last makes images that are, too.
        return images.reshape(inputs, -1).T.contiguous(), bias

    stages = tuple(_Affine(layer.relu) for layer in layers)
    order = torch.arange(math.prod(layers[-1].out_shape))
    return _Network(stages, order, lambda: [pack(layer) for layer in layers])


def _side_by_side_network(networks: list[_Network]) -> _Network:
    """Dense networks of one shape as one, with batched products."""

    def pack() -> list[tuple[Tensor, ...]]:
        layers = zip(*(network.pack() for network in networks), strict=True)
        return [tuple(map(torch.stack, zip(*layer, strict=True))) for layer in layers]

    stages = tuple(_BlockAffine(stage.relu) for stage in networks[0].stages)
    return _Network(stages, networks[0].order, pack)


def _rewritten_network(layers: list[_Layer]) -> _Network:
    """Linear layers, and transposed convolutions over blocks on channels-last images.

    ``order`` maps positions of our flattened activations to those of the model. Where a linear
    layer meets an image, its weights absorb the change of order.
    """
    stages: list[_Stage] = []
    packers: list[Callable[[], tuple[Tensor, ...]]] = []
    order = torch.arange(math.prod(layers[0].in_shape))
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if isinstance(layer.module, nn.Linear):
            in_order, order = order, torch.arange(layer.module.out_features)
            if following is not None and isinstance(following.module, nn.ConvTranspose2d):
                order = _channels_last(following.in_shape)
            stages.append(_Affine(layer.relu))
            packers.append(functools.partial(_pack_linear, layer.module, in_order, order))
            continue
        if not torch.equal(order, _channels_last(layer.in_shape)):
            raise ValueError(
                f"this route needs a linear layer before the reshape to {layer.in_shape}"
            )
        stage = _blocks(layer, is_last=following is None)
        order = _channels_last(layer.out_shape)
        if stage.keep_blocks:
            rows, columns = stage.num_blocks
            order = order.view(rows, stage.block, columns, stage.block, -1)
            order = order.transpose(1, 2).flatten()
        stages.append(stage)
        packers.append(functools.partial(_pack_blocks, layer.module, stage))
    return _Network(tuple(stages), order, lambda: [pack() for pack in packers])


def _channels_last(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape).permute(1, 2, 0).flatten()


def _blocks(layer: _Layer, is_last: bool) -> _Blocks:
    """How to run a transposed convolution over blocks; the last one leaves its pixels in them."""
    module = layer.module
    (kernel, _), (stride, _), (padding, _) = module.kernel_size, module.stride, module.padding
    square = all(a == b for a, b in (module.kernel_size, module.stride, module.padding))
    if not square or module.groups != 1 or module.dilation != (1, 1):
        raise ValueError(
            f"this route needs square kernels, one group and no dilation; got {module}"
        )
    block = stride
    if is_last and layer.out_shape[0] * stride**2 < _VECTOR_WIDTH:
        # Larger blocks make more channels, which fill the vector registers.
        block = 2 * stride if not any(n % (2 * stride) for n in layer.out_shape[1:]) else stride
    return _Blocks(
        layer.relu,
        layer.in_shape,
        layer.out_shape,
        stride,
        padding,
        block,
        window=(-((kernel - 1 - padding) // stride), (block - 1 + padding) // stride),
        keep_blocks=is_last and not any(n % block for n in layer.out_shape[1:]),
    )


def _bias(module: nn.Linear | nn.ConvTranspose2d, size: int) -> Tensor:
    return module.weight.new_zeros(size) if module.bias is None else module.bias.detach()


def _pack_linear(module: nn.Linear, in_order: Tensor, out_order: Tensor) -> tuple[Tensor, Tensor]:
    weight = module.weight.detach()
    in_order, out_order = in_order.to(weight.device), out_order.to(weight.device)
    return weight[out_order][:, in_order], _bias(module, module.out_features)[out_order]


def _pack_blocks(module: nn.ConvTranspose2d, stage: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
    weight, kernel = module.weight.detach(), module.kernel_size[0]
    # The tap that takes an input of the window to a pixel of the block, or the zero behind the last
    first, last = stage.window
    inputs, pixels = torch.arange(first, last + 1), torch.arange(stage.block)
    taps = pixels[:, None] + stage.padding - stage.stride * inputs
    taps = torch.where((taps >= 0) & (taps < kernel), taps, kernel).to(weight.device)
    padded = F.pad(weight, (0, 1, 0, 1))
    windows = padded[:, :, taps[:, :, None, None], taps]  # [in, out, block, window, block, window]
    forward = windows.permute(2, 4, 1, 0, 3, 5).flatten(0, 2)
    return (
        forward.contiguous(memory_format=torch.channels_last),
        _bias(module, module.out_channels).repeat(stage.block**2),
        weight.clone(memory_format=torch.channels_last),
    )


# --- compilation and CUDA graphs -----------------------------------------------------------------


_COMPILED: dict[tuple, Callable | None] = {}


def _compile(
    stages: tuple[_Stage, ...], weights: list, z: Tensor, signs: Tensor
) -> Callable | None:
    """The compiled function, or None, with one warning, where PyTorch cannot compile."""
    key = (stages, weights[0][0].dtype, z.dtype, z.device)
    if key not in _COMPILED:
        # PyTorch turns the checks of all distributions off when it compiles for the first time.
        with argument_validation(True):
            _COMPILED[key] = _try_to_compile(stages, weights, z, signs)
    return _COMPILED[key]


def _try_to_compile(
    stages: tuple[_Stage, ...], weights: list, z: Tensor, signs: Tensor
) -> Callable | None:
    @functools.partial(torch.compile, fullgraph=True)
    def compiled(weights: list, z: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        return _value_and_grad(stages, weights, z, signs)

    def run(weights: list, z: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        # PyTorch chooses another convolution for fewer images, hence compiles anew.
        missing = max(0, _FEWEST_ROWS - len(z))
        if missing:
            z, signs = F.pad(z, (0, 0, 0, missing)), F.pad(signs, (0, 0, 0, missing))
        value, grad = compiled(weights, z, signs)
        return (value[:-missing], grad[:-missing]) if missing else (value, grad)

    torch._dynamo.maybe_mark_dynamic(z, 0)  # one compilation for all numbers of chains
    torch._dynamo.maybe_mark_dynamic(signs, 0)
    try:
        run(weights, z, signs)
    except Exception as error:  # whatever a missing or broken toolchain raises
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            "torch.compile failed, so the 'rewritten' route takes the place of 'compiled'; "
            f"is there a C++ compiler? ({type(error).__name__}: {reason})",
            stacklevel=3,
        )
        return None
    return run


class _CudaGraphs:
    """Replay the launches of a function from CUDA graphs, one for each number of chains.

    The weights must stay where they are; the results are overwritten by the next call.
    """

    capacity = 4

    def __init__(self, function: Callable):
        self.function = function
        self.graphs: dict[int, tuple] = {}

    def __call__(self, weights: list, z: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        if is_capturing():  # the launches become part of the larger graph
            return self.function(weights, z, signs)
        with torch.cuda.device(z.device):
            if len(z) not in self.graphs:
                if len(self.graphs) == self.capacity:
                    self.graphs.pop(next(iter(self.graphs)))
                self.graphs[len(z)] = self._capture(weights, z.clone(), signs.clone())
            graph, graph_z, graph_signs, results = self.graphs[len(z)]
            graph_z.copy_(z)
            graph_signs.copy_(signs)
            graph.replay()
        return results

    def _capture(self, weights: list, z: Tensor, signs: Tensor) -> tuple:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose algorithms and allocate workspaces here
                self.function(weights, z, signs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.function(weights, z, signs)
        return graph, z, signs, results
