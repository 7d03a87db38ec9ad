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

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cuda import CapturedFunction
from .models import (
    BernoulliDecoder,
    LatentVariableModel,
    as_model,
    check_fixed,
    checked_observations,
    like,
)
from .numerics import check_counts, is_capturing, value_and_grad

ROUTES = ("auto", "eager", "rewritten", "dense")
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
        last, pixels left in blocks, chains in chunks that fit the cache.
    ``dense``
        transposed convolutions unrolled to dense matrices; on CUDA inside a CUDA graph.
    ``auto``
        ``dense`` on CUDA, else ``rewritten``; ``eager`` for a model that they do not cover.

    Routes other than ``eager`` cover :class:`~amortised.models.BernoulliDecoder` with a decoder
    built as ``nn.Sequential`` of ``Linear``, ``ReLU``, ``Unflatten``, ``ConvTranspose2d`` and
    ``Flatten``.

    **Low precision.** ``dtype=torch.bfloat16`` (or float16) stores weights and activations in that
    type; positions, momenta and the sum over pixels stay in the model's type. It is for the
    *dynamics*. Leapfrog is reversible and preserves volume under any deterministic force, so the
    force need not be an exact gradient: only the energies that decide acceptance and weights must
    be exact. :meth:`LogLikelihoodAndGrad.log_likelihood` gives them in the model's type, one
    forward pass per temperature::

        fast_fn = log_likelihood_and_grad(model, x, dtype=torch.bfloat16)
        path = AnnealedPath(log_prior_fn, fast_fn.log_likelihood,
                            likelihood_value_and_grad=fast_fn, exact_energies=True)
        ais(path, z0, settings)

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
    model = as_model(model)
    check_fixed(model)
    weight = like(model)
    if dtype not in (None, weight.dtype, *_LOW_PRECISION):
        raise ValueError(f"dtype must be {weight.dtype}, bfloat16 or float16; got {dtype}")
    if chunk_size is None:
        chunk_size = 256 * torch.get_num_threads() if weight.device.type == "cpu" else 65_536
    check_counts(chunk_size=chunk_size)
    return LogLikelihoodAndGrad(model, x, route, dtype or weight.dtype, chunk_size)


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
        self, model: LatentVariableModel, x: Tensor, route: str, dtype: torch.dtype, chunk_size: int
    ):
        self._model, self._like = model, like(model).new_empty(0)
        self.dtype, self.chunk_size = dtype, chunk_size
        self.route, self._stages, order = _choose(model, route)
        self._order = order.to(self._like.device)
        self._observe(x)
        if self.route == "eager":
            if dtype is not self._like.dtype:
                raise ValueError(f"the eager route runs in the model's own type; got dtype={dtype}")
            self._networks = []
            self._value = partial(_autograd_value, model)
            self._value_and_grad = partial(_autograd, model)
        else:
            packed = [stage.pack() for stage in self._stages]
            types = dict.fromkeys((self._like.dtype, dtype))
            self._networks = [_Network(self._stages, packed, t) for t in types]
            self._value = self._networks[0].value
            self._value_and_grad = self._networks[-1].value_and_grad
            if self.route == "dense" and self._like.device.type == "cuda":
                self._value_and_grad = CapturedFunction(self._value_and_grad)
        self._versions = self._weight_versions()

    def _observe(self, x: Tensor) -> None:
        """Check x, and keep what the likelihood needs of it: for pixels, the signs ``2 x - 1``."""
        is_binary = _is_bernoulli(self._model)
        x = x.to(self._like.device)
        x = checked_observations(self._model, x, is_binary and not is_capturing())
        self._data = (2.0 * x - 1.0)[:, self._order] if is_binary else x.clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood and gradient, ``[..., B, D] -> ([..., B], [..., B, D])``.

        :raises ValueError: when the shape, type or device of z does not fit the model and x.
        :raises RuntimeError: when the weights changed since the last :meth:`refresh`.
        """
        value, grad = z.new_empty(z.shape[:-1]), z.new_empty(z.shape)
        flat_value, flat_grad = value.view(-1), grad.view(-1, z.shape[-1])
        for part, z_part, data in self._chunks(z):
            flat_value[part], flat_grad[part] = self._value_and_grad(z_part, data)
        return value, grad

    @torch.inference_mode(False)
    @torch.no_grad()
    def log_likelihood(self, z: Tensor) -> Tensor:
        """The log-likelihood alone, in the model's own type whatever ``dtype``: ``[..., B]``.

        Arguments and errors as in a call.
        """
        value = z.new_empty(z.shape[:-1])
        for part, z_part, data in self._chunks(z):
            value.view(-1)[part] = self._value(z_part, data)
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
        packed = [stage.pack() for stage in self._stages]
        for network in self._networks:
            network.refresh(packed)
        self._versions = self._weight_versions()
        return self

    def _weight_versions(self) -> list[tuple[int, int]]:
        weights = itertools.chain(self._model.parameters(), self._model.buffers())
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]

    def _chunks(self, z: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Check z, and cut the flattened chains into nearly equal chunks.

        Yields where the chunk is, its chains, and the observation that belongs to each chain.
        """
        latent_dim, num_images, like = self._model.latent_dim, len(self._data), self._like
        if z.shape[-1:] != (latent_dim,) or (num_images > 1 and z.shape[-2:-1] != (num_images,)):
            raise ValueError(
                f"z must be [..., B = {num_images}, D = {latent_dim}]; got shape {tuple(z.shape)}"
            )
        if z.dtype != like.dtype or z.device != like.device:
            weights, found = f"{like.dtype} on {like.device}", f"{z.dtype} on {z.device}"
            raise ValueError(f"z must be {weights}, like the model's weights; got {found}")
        if self._versions != self._weight_versions():
            raise RuntimeError("the weights changed since they were packed; call refresh()")
        flat = z.detach().reshape(-1, latent_dim)
        num_chunks = math.ceil(len(flat) / self.chunk_size)
        num_chunks = min(num_chunks, max(1, len(flat) // _FEWEST_ROWS))
        for i in range(num_chunks):
            start, stop = i * len(flat) // num_chunks, (i + 1) * len(flat) // num_chunks
            rows = torch.arange(start, stop, device=z.device) % num_images
            yield slice(start, stop), flat[start:stop], self._data[rows]


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
    return isinstance(model, BernoulliDecoder) and all(
        getattr(type(model), name) is getattr(BernoulliDecoder, name)
        for name in ("logits", "likelihood", "log_likelihood")
    )


def _autograd_value(model: LatentVariableModel, z: Tensor, data: Tensor) -> Tensor:
    # Through the logits, a trajectory that diverged has log-likelihood nan, which a sampler
    # rejects; the distribution's own checks would raise an error, and cost time.
    if _is_bernoulli(model):
        return F.logsigmoid(model.logits(z) * data).sum(-1)
    return model.log_likelihood(data, z)


def _autograd(model: LatentVariableModel, z: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_grad(lambda z: _autograd_value(model, z, data), z)


# --- the chain rule, written out -----------------------------------------------------------------


class _Network:
    """Stages with their packed weights in one type, for z ``[N, D]`` and signs ``[N, P]``."""

    def __init__(self, stages: list[_Stage], packed: list[tuple[Tensor, ...]], dtype: torch.dtype):
        self.stages = stages
        self.weights = [tuple(w.to(dtype) for w in weights) for weights in packed]

    def refresh(self, packed: list[tuple[Tensor, ...]]) -> None:
        """Take other weights, in place, where captured graphs read them."""
        for weights, fresh in zip(self.weights, packed, strict=True):
            for old, new in zip(weights, fresh, strict=True):
                old.copy_(new)

    def value(self, z: Tensor, signs: Tensor) -> Tensor:
        """The log-likelihood."""
        logits = self._forward(z)[-1].to(signs.dtype)
        return F.logsigmoid(logits.mul_(signs)).sum(-1)

    def value_and_grad(self, z: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """The log-likelihood and its gradient in z."""
        activations = self._forward(z)
        margins = activations[-1].to(signs.dtype) * signs
        value = F.logsigmoid(margins).sum(-1)
        grad = torch.sigmoid(margins.neg_()).mul_(signs).to(activations[-1].dtype)
        for i, stage in reversed(list(enumerate(self.stages))):
            if stage.relu:
                grad = torch.ops.aten.threshold_backward(grad, activations[i], 0)
            grad = stage.backward(grad, *self.weights[i])
        return value, grad.to(z.dtype)

    def _forward(self, z: Tensor) -> list[Tensor]:
        """The output of each stage, flattened to ``[N, features]``."""
        outputs, a = [], z.to(self.weights[0][0].dtype)
        for stage, weights in zip(self.stages, self.weights, strict=True):
            a = stage.forward(a, *weights)
            outputs.append(a.relu_() if stage.relu else a)
        return outputs


class _Affine(NamedTuple):
    """``a W' + b``; packs the weights W ``[out, in]`` and b."""

    relu: bool
    pack: Callable[[], tuple[Tensor, Tensor]]

    def forward(self, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(a, weight, bias)

    def backward(self, grad: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grad @ weight


class _Blocks:
    """A transposed convolution as a convolution over blocks, on flattened channels-last images.

    Its weights are those of the forward convolution, its bias, and those of the backward one. The
    last stage of a network leaves its pixels as [block rows, block columns, rows, columns,
    channels]; ``order`` maps positions of the flattened output to those of the model.
    """

    def __init__(self, layer: _Layer, is_last: bool):
        module = layer.module
        square = all(a == b for a, b in (module.kernel_size, module.stride, module.padding))
        if not square or module.groups != 1 or module.dilation != (1, 1):
            raise ValueError(f"this route needs square kernels, one group, no dilation: {module}")
        self.module, self.relu = module, layer.relu
        self.in_shape, self.out_shape = layer.in_shape, layer.out_shape
        channels, *sides = layer.out_shape
        block = stride = module.stride[0]
        if is_last and channels * stride**2 < _VECTOR_WIDTH:
            # Larger blocks make more channels, which fill the vector registers.
            block *= 1 if any(n % (2 * stride) for n in sides) else 2
        self.block, self.num_blocks = block, [-(-n // block) for n in sides]  # rows and columns
        self.keep_blocks = is_last and not any(n % block for n in sides)
        # The first and last input that a block depends on, relative to its own, and the tap that
        # takes an input to a pixel of the block, or the zero behind the last tap.
        kernel, padding = module.kernel_size[0], module.padding[0]
        self.window = -((kernel - 1 - padding) // stride), (block - 1 + padding) // stride
        inputs = torch.arange(self.window[0], self.window[1] + 1)
        taps = torch.arange(block)[:, None] + padding - stride * inputs
        self.taps = torch.where((taps >= 0) & (taps < kernel), taps, kernel)
        self.order = _channels_last(layer.out_shape)
        if self.keep_blocks:
            rows, columns = self.num_blocks
            order = self.order.view(rows, block, columns, block, channels)
            self.order = order.transpose(1, 2).flatten()

    def pack(self) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.module.weight.detach()
        taps, padded = self.taps.to(weight.device), F.pad(weight, (0, 1, 0, 1))
        # [in, out, block, window, block, window]
        windows = padded[:, :, taps[:, :, None, None], taps]
        forward = windows.permute(2, 4, 1, 0, 3, 5).flatten(0, 2)
        return (
            forward.contiguous(memory_format=torch.channels_last),
            _bias(self.module, self.out_shape[0]).repeat(self.block**2),
            weight.clone(memory_format=torch.channels_last),
        )

    def forward(self, a: Tensor, weight: Tensor, bias: Tensor, _backward: Tensor) -> Tensor:
        channels, *sides = self.in_shape
        image = a.view(-1, *sides, channels).permute(0, 3, 1, 2)
        window_stride, (first, last) = self.block // self.module.stride[0], self.window
        before = -first
        after = [
            window_stride * (b - 1) + last - (n - 1)
            for b, n in zip(self.num_blocks, sides, strict=True)
        ]
        if before < max(0, *after):
            image, before = F.pad(image, (before, after[1], before, after[0])), 0
        y = F.conv2d(image, weight, bias, window_stride, before).permute(0, 2, 3, 1)
        rows, columns = self.num_blocks
        y = y[:, :rows, :columns]
        if not self.keep_blocks:
            channels, height, width = self.out_shape
            y = y.reshape(-1, rows, columns, self.block, self.block, channels).transpose(2, 3)
            y = y.reshape(-1, rows * self.block, columns * self.block, channels)
            y = y[:, :height, :width]
        return y.reshape(len(a), -1)

    def backward(self, grad: Tensor, _forward: Tensor, _bias: Tensor, weight: Tensor) -> Tensor:
        channels, height, width = self.out_shape
        if self.keep_blocks:
            blocks = grad.view(-1, *self.num_blocks, self.block, self.block, channels)
            grad = blocks.transpose(2, 3)
        image = grad.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        image = F.conv2d(image, weight, None, self.module.stride, self.module.padding)
        return image.permute(0, 2, 3, 1).reshape(len(grad), -1)


_Stage = _Affine | _Blocks


# --- from modules to stages ----------------------------------------------------------------------


class _Layer(NamedTuple):
    """A layer with weights, the shapes of one example before and after, and what follows it."""

    module: nn.Linear | nn.ConvTranspose2d
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    relu: bool


def _choose(model: LatentVariableModel, route: str) -> tuple[str, list[_Stage], Tensor]:
    """The route to take, its stages, and the order in which they leave the pixels.

    :raises ValueError: when the route does not cover the model, saying why.
    """
    chosen = route
    if route == "auto":
        chosen = "dense" if like(model).device.type == "cuda" else "rewritten"
    if chosen != "eager":
        try:
            return chosen, *(_dense(model) if chosen == "dense" else _rewritten(model))
        except ValueError:
            if route != "auto":
                raise
    return "eager", [], torch.arange(model.observation_dim)


def _layers(model: LatentVariableModel) -> list[_Layer]:
    if not _is_bernoulli(model):
        raise ValueError(f"{type(model).__name__} is no BernoulliDecoder; only 'eager' covers it")
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
        elif (kind, len(shape)) in ((nn.Linear, 1), (nn.ConvTranspose2d, 3)):
            shape = tuple(module(module.weight.new_zeros(1, *shape)).shape[1:])
            layers.append(_Layer(module, in_shape, shape, relu=False))
        else:
            raise ValueError(f"only the 'eager' route covers a decoder with {module}, {shape}")
    return layers


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of nested ``nn.Sequential`` in the order of use, repeated where reused."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flatten(child)
    else:
        yield module


def _dense(model: LatentVariableModel) -> tuple[list[_Stage], Tensor]:
    """Every layer an affine map of flattened activations, in the model's own order."""
    stages = [_Affine(layer.relu, partial(_pack_dense, layer)) for layer in _layers(model)]
    return stages, torch.arange(model.observation_dim)


def _pack_dense(layer: _Layer) -> tuple[Tensor, Tensor]:
    module, weight = layer.module, layer.module.weight.detach()
    bias = module(weight.new_zeros(1, *layer.in_shape)).detach().flatten()
    if isinstance(module, nn.Linear):
        return weight.clone(), bias
    inputs = math.prod(layer.in_shape)
    basis = torch.eye(inputs, dtype=bias.dtype, device=bias.device).view(-1, *layer.in_shape)
    geometry = module.stride, module.padding, module.output_padding, module.groups, module.dilation
    # Exact in float32: CUDA would else be free to round a convolution to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        images = F.conv_transpose2d(basis, weight, None, *geometry)
    # A weight that is stored channels last makes images that are, too.
    return images.reshape(inputs, -1).T.contiguous(), bias


def _rewritten(model: LatentVariableModel) -> tuple[list[_Stage], Tensor]:
    """Linear layers, and transposed convolutions over blocks on channels-last images.

    The order maps positions of our flattened activations to those of the model. Where a linear
    layer meets an image, its weights absorb the change of order.
    """
    stages: list[_Stage] = []
    layers, order = _layers(model), torch.arange(model.latent_dim)
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if isinstance(layer.module, nn.Linear):
            in_order, order = order, torch.arange(layer.module.out_features)
            if following is not None and isinstance(following.module, nn.ConvTranspose2d):
                order = _channels_last(following.in_shape)
            stages.append(_Affine(layer.relu, partial(_pack_linear, layer.module, in_order, order)))
        elif torch.equal(order, _channels_last(layer.in_shape)):
            stages.append(_Blocks(layer, is_last=following is None))
            order = stages[-1].order
        else:
            raise ValueError(f"this route needs a linear layer before an image {layer.in_shape}")
    return stages, order


def _channels_last(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape).permute(1, 2, 0).flatten()


def _pack_linear(module: nn.Linear, in_order: Tensor, out_order: Tensor) -> tuple[Tensor, Tensor]:
    weight = module.weight.detach()
    in_order, out_order = in_order.to(weight.device), out_order.to(weight.device)
    return weight[out_order][:, in_order], _bias(module, module.out_features)[out_order]


def _bias(module: nn.Linear | nn.ConvTranspose2d, size: int) -> Tensor:
    return module.weight.new_zeros(size) if module.bias is None else module.bias.detach()
