r"""One training loop, with checkpoints from which an interrupted run goes on exactly.

:func:`fit` visits the data in shuffled minibatches and calls ``step`` on each. What a step does is
the caller's business: one optimiser or three, a game, a Markov chain for each image. The common
case, gradient descent on one loss, is made by :func:`gradient_step`.

A run that is stopped at any moment, by ``kill -9`` for instance, and started again with the same
arguments ends with the same parameters, to the last bit, as a run that was left alone (on the same
machine, with deterministic kernels). For this a checkpoint holds everything that the future of a
run depends on: the state of each named object, the state of the random number generators, and the
place in the data. It is in the safetensors format, tensors and JSON, so that reading it runs no
code.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

__all__ = [
    "CheckpointError",
    "CheckpointLockedError",
    "CudaGraphStep",
    "FitResult",
    "NonFiniteError",
    "OutOfTimeError",
    "checkpoint_lock",
    "cosine_decay",
    "fit",
    "gradient_step",
    "read_checkpoint",
    "write_checkpoint",
]

Step = Callable[..., Mapping[str, Tensor]]

_FORMAT = "1"  # of checkpoints; raise it when a file of before could be misread

MAX_FILE_BYTES = 15_000_000
"""A checkpoint that is larger lies in several files of at most this size."""

_LOSSES_KEPT_ON_DEVICE = 64  # steps between two transfers of the losses from an accelerator


class FitResult(NamedTuple):
    """What a run did, over all its parts if it was interrupted.

    :ivar history: the value of each loss at each step, ``[num_steps]``, on the CPU.
    :ivar num_steps: steps done.
    :ivar steps_per_epoch: steps in one pass over the data.
    :ivar finished: ``False`` if ``max_seconds`` ended the run early.
    :ivar seconds: wall time spent in training.
    """

    history: dict[str, Tensor]
    num_steps: int
    steps_per_epoch: int
    finished: bool
    seconds: float

    def epoch_means(self, name: str) -> Tensor:
        """Mean of one loss over each complete epoch, ``[num_epochs]``."""
        num_epochs = self.num_steps // self.steps_per_epoch
        values = self.history[name][: num_epochs * self.steps_per_epoch]
        return values.reshape(num_epochs, self.steps_per_epoch).mean(dim=1)


class NonFiniteError(FloatingPointError):
    """Training produced an infinity or a nan; a checkpoint on disk is from before it.

    :ivar step: number of the step, counted from 1.
    :ivar checkpoint: path of the last good checkpoint, or ``None``.
    """

    def __init__(self, message: str, step: int, checkpoint: Path | None):
        super().__init__(message)
        self.step, self.checkpoint = step, checkpoint


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to a different run."""


class OutOfTimeError(RuntimeError):
    """The time that was granted has passed before the end; what is done so far is kept."""


class CheckpointLockedError(RuntimeError):
    """Another process is at work on the same checkpoint."""


# --- the loop ------------------------------------------------------------------------------------


def fit(
    step: Step,
    data: Tensor | tuple[Tensor, ...],
    *,
    epochs: int,
    batch_size: int,
    state: Mapping[str, object],
    generator: torch.Generator,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    max_seconds: float | None = None,
    drop_last: bool = True,
    config: Mapping[str, object] | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Train for a number of passes over the data, or go on with a run that was interrupted.

    Beside ``step``, the loop takes about 20 microseconds for a step.

    :param step: ``step(*batch)`` makes one update and returns a dictionary of scalar losses to
        record, always with the same names. It is first called after a checkpoint has been read, so
        a step that captures a CUDA graph should do so in its first call.
    :param data: a tensor ``[N, ...]``, or a tuple of tensors on one device with the same ``N``.
        Batches are slices of it on that device.
    :param epochs: passes over the data, in all. A finished run is trained on when it is called
        again with more.
    :param batch_size: examples in a batch.
    :param state: everything that ``step`` changes, by name: modules, optimisers, schedulers and
        other objects with ``state_dict`` and ``load_state_dict``, tensors (restored in place), and
        generators. The global generators of PyTorch are included without being named; those of
        NumPy and of Python are not.
    :param generator: CPU generator that shuffles the data, anew in each epoch.
    :param checkpoint: file to keep the state in. If it exists, the run goes on from it. Beside it
        live ``.previous``, the checkpoint before it, and, while a run is at work, ``.lock``. Needs
        a POSIX system.
    :param checkpoint_every: steps between two checkpoints; one epoch by default. A checkpoint is
        also made at the end.
    :param max_seconds: stop after the step that passes this time, with a checkpoint if there is
        one. At least one step is made, so repeated calls always arrive.
    :param drop_last: leave out the last ``N % batch_size`` examples of an epoch (others in each
        epoch), so that all batches have one shape. ``False`` keeps them as a smaller batch.
    :param config: plain values that define the run. A checkpoint with other values is refused.
    :param progress: show a progress bar, if the standard error is a terminal. Notebooks and log
        files stay clean.
    :return: a :class:`FitResult`.
    :raises ValueError: if the arguments do not fit together; nothing has been done then.
    :raises CheckpointError: if the checkpoint is of a different run, naming what differs, or if
        neither it nor the one before it can be read.
    :raises CheckpointLockedError: if another process uses the checkpoint.
    :raises NonFiniteError: if a loss, or a tensor about to be saved, is not finite, or if ``step``
        raises a ``FloatingPointError``. On the CPU the losses are looked at after each step, on an
        accelerator every 64 steps and before each checkpoint, so that the device need not wait; no
        checkpoint is made of a bad state.
    :raises OSError: if a checkpoint cannot be written. The ones before it are intact.

    >>> data = torch.arange(8.0)
    >>> mean = torch.zeros((), requires_grad=True)
    >>> optimizer = torch.optim.SGD([mean], lr=0.5)
    >>> result = fit(
    ...     gradient_step(lambda x: (x - mean) ** 2, optimizer), data, epochs=5, batch_size=8,
    ...     state={"mean": mean, "optimizer": optimizer},
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> mean.item(), result.num_steps, result.epoch_means("loss")[-1].item()
    (3.5, 5, 5.25)
    """
    tensors = data if isinstance(data, tuple) else (data,)
    _check_arguments(tensors, epochs, batch_size, state, generator, checkpoint_every, drop_last)
    num_examples, device = len(tensors[0]), tensors[0].device
    steps_per_epoch = num_examples // batch_size
    if not drop_last and num_examples % batch_size:
        steps_per_epoch += 1
    total_steps = epochs * steps_per_epoch
    save_every = steps_per_epoch if checkpoint_every is None else checkpoint_every
    settings = {
        "batch_size": batch_size,
        "drop_last": drop_last,
        "data": [_layout_of(t) for t in tensors],
        "device": device.type,
        "config": {} if config is None else dict(config),
    }
    path = None if checkpoint is None else Path(checkpoint)
    last_saved, done, seconds_before = None, 0, 0.0
    order = epoch_generator = mid_epoch_generator = None
    record = _LossRecord(total_steps)
    initial_layout = _layout(_read_state(state))
    _layout(settings)  # refuses now what no checkpoint could hold

    with contextlib.ExitStack() as stack:
        if path is not None:
            stack.enter_context(checkpoint_lock(path))
            saved = read_checkpoint(path)
            if saved is not None:
                _check_same_run(path, saved, settings, initial_layout, total_steps)
                _write_state(state, saved["state"])
                _write_random_state(saved["random"])
                mid_epoch_generator = saved["generator"]
                at_start_of_epoch = saved["done"] % steps_per_epoch == 0
                generator.set_state(saved["generator" if at_start_of_epoch else "epoch_generator"])
                record.restore(saved["loss_names"], saved["losses"])
                done, seconds_before, last_saved = saved["done"], saved["seconds"], path
                initial_layout = saved["initial_layout"]

        bar = stack.enter_context(
            tqdm(
                total=epochs * min(steps_per_epoch * batch_size, num_examples),
                initial=done * batch_size,
                unit=" samples",
                unit_scale=True,
                dynamic_ncols=True,
                disable=None if progress else True,  # None: disabled unless stderr is a terminal
            )
        )
        started = shown = now = time.monotonic()
        out_of_time = False
        while done < total_steps and not out_of_time:
            position = done % steps_per_epoch
            if position == 0 or order is None:
                epoch_generator = generator.get_state()
                order = torch.randperm(num_examples, generator=generator).to(device)
                if position > 0:  # resumed within an epoch, and has just drawn its order again
                    generator.set_state(mid_epoch_generator)
            index = order[position * batch_size : (position + 1) * batch_size]
            try:
                losses = step(*(t[index] for t in tensors))
            except FloatingPointError as error:  # a Markov chain that diverged, for instance
                raise _non_finite(str(error), done + 1, last_saved) from error
            done += 1
            record.add(losses, last_saved)

            now = time.monotonic()
            out_of_time = max_seconds is not None and now - started >= max_seconds
            stops = out_of_time or done == total_steps
            if path is not None and (stops or done % save_every == 0):
                record.flush(last_saved)
                checked_state = _finite(_read_state(state), done, last_saved)
                write_checkpoint(
                    path,
                    {
                        "state": checked_state,
                        "random": _read_random_state(),
                        "generator": generator.get_state(),
                        "epoch_generator": epoch_generator,
                        "done": done,
                        "seconds": seconds_before + now - started,
                        "loss_names": record.names,
                        "losses": record.values[:done],
                        "settings": settings,
                        "initial_layout": initial_layout,
                    },
                )
                last_saved = path
            if not bar.disable:
                if now - shown > 0.5 or stops:
                    bar.set_postfix(record.latest(last_saved), refresh=False)
                    shown = now
                bar.update(len(index))
        record.flush(last_saved)
        _finite(_read_state(state), done, last_saved)
    return FitResult(
        history={name: record.values[:done, i] for i, name in enumerate(record.names)},
        num_steps=done,
        steps_per_epoch=steps_per_epoch,
        finished=done == total_steps,
        seconds=seconds_before + now - started,
    )


def gradient_step(
    loss_fn: Callable[..., Tensor | Mapping[str, Tensor]],
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
) -> Step:
    """Make the ``step`` of :func:`fit` that descends the gradient of one loss.

    :param loss_fn: ``loss_fn(*batch)`` returns the loss, per example or already reduced, or a
        dictionary with an entry ``"loss"`` and others to be recorded. Means are taken here.
    :param optimizer: the optimiser, which holds the parameters.
    :param scheduler: learning-rate schedule that advances at each step.
    :return: a step that returns the mean losses.

    >>> z = torch.ones(2, requires_grad=True)
    >>> step = gradient_step(lambda x: (z * x).sum(-1), torch.optim.SGD([z], lr=0.1))
    >>> step(torch.ones(5, 2))["loss"].item(), z.tolist()
    (2.0, [0.8999999761581421, 0.8999999761581421])
    """

    def step(*batch: Tensor) -> dict[str, Tensor]:
        losses = loss_fn(*batch)
        if isinstance(losses, Tensor):
            losses = {"loss": losses}
        if "loss" not in losses:
            raise ValueError(f"loss_fn returned {sorted(losses)}; one entry must be named 'loss'")
        losses = {name: value.mean() for name, value in losses.items()}
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        return {name: value.detach() for name, value in losses.items()}

    return step


class CudaGraphStep:
    r"""A training step captured once as a CUDA graph, then replayed: one launch for hundreds.

    Small networks spend most of a step on launching kernels. A graph launches them all at once. The
    step must always do the same: batches of one shape, no value looked at on the processor,
    optimisers with ``capturable=True`` and their learning rate in a tensor on the device, where a
    schedule *outside* the graph fills in new values. Draws from the global stream of the device go
    on as they would without a graph.

    At its first call the step runs three times to warm up and is then captured; everything it
    changed is put back, so that the run is the one it would have been. The checks that need a
    value, such as that of :func:`amortised.mcmc.langevin_step`, see the warm-up alone: afterwards a
    position that is not finite shows in the losses, which :func:`fit` watches.

    :param step: as for :func:`fit`, on tensors of one CUDA device.
    :param state: everything that it changes: modules, optimisers and tensors, by name.

    >>> step = CudaGraphStep(lambda x: {"loss": x.mean()}, {})
    >>> step(torch.ones(3))
    Traceback (most recent call last):
        ...
    ValueError: a CUDA graph needs batches on a CUDA device; got one on cpu
    """

    num_warm_up_steps = 3

    def __init__(self, step: Callable[..., Mapping[str, Tensor]], state: Mapping[str, object]):
        self.step, self.state = step, state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._losses: Mapping[str, Tensor] = {}

    def __call__(self, *batch: Tensor) -> Mapping[str, Tensor]:
        """Make one step. The losses are overwritten by the next one."""
        if self._graph is None:
            for tensor in batch:
                if tensor.device.type != "cuda":
                    raise ValueError(
                        f"a CUDA graph needs batches on a CUDA device; got one on {tensor.device}"
                    )
            with torch.cuda.device(batch[0].device):
                self._capture(batch)
        for fixed, new in zip(self._batch, batch, strict=True):
            if fixed.shape != new.shape:
                raise ValueError(
                    f"a captured step takes batches of shape {tuple(fixed.shape)}; got "
                    f"{tuple(new.shape)} (use drop_last=True)"
                )
            fixed.copy_(new)
        self._graph.replay()
        return self._losses

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        self._batch = tuple(tensor.clone() for tensor in batch)
        put_back = _remember(self.state)
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.num_warm_up_steps):
                self.step(*self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        put_back()
        torch.cuda.set_rng_state(random_state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._losses = self.step(*self._batch)
        self._graph = graph


def _remember(state: Mapping[str, object]) -> Callable[[], None]:
    """A function that puts all tensors back as they are now, in place.

    An optimiser has no moments before its first step; those it makes afterwards are set to zero.
    """

    def tensors() -> dict[tuple, Tensor]:
        found: dict[tuple, Tensor] = {}
        for name, thing in state.items():
            if isinstance(thing, Tensor):
                found[name, ""] = thing
            elif isinstance(thing, torch.nn.Module):
                found |= {(name, key): value for key, value in thing.state_dict().items()}
            elif isinstance(thing, Optimizer):
                for number, moments in enumerate(thing.state.values()):
                    for key, value in moments.items():
                        found[name, number, key] = value
            else:
                raise TypeError(
                    f"state[{name!r}] is a {type(thing).__name__}; a captured step can change "
                    "tensors, modules and optimisers"
                )
        return found

    before = {key: value.detach().clone() for key, value in tensors().items()}

    @torch.no_grad()
    def put_back() -> None:
        for key, value in tensors().items():
            if key in before:
                value.copy_(before[key])
            else:
                value.zero_()

    return put_back


def cosine_decay(optimizer: Optimizer, num_steps: int) -> LambdaLR:
    r"""Learning rate that falls to zero along half a cosine,
    :math:`\eta_t = \tfrac12 \eta_0 \{1 + \cos(\pi t / T)\}` for :math:`t < T`, then stays there.

    The schedule is a closed form in the step number, so it is the same after a resume.

    :param optimizer: optimiser with the learning rate :math:`\eta_0`.
    :param num_steps: :math:`T`, steps of the optimiser.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    >>> scheduler, rates = cosine_decay(optimizer, num_steps=2), []
    >>> for _ in range(3):
    ...     rates += [round(optimizer.param_groups[0]["lr"], 6)]
    ...     optimizer.step(); scheduler.step()
    >>> rates
    [2.0, 1.0, 0.0]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return LambdaLR(optimizer, [_HalfCosine(num_steps) for _ in optimizer.param_groups])


class _HalfCosine:
    """An object, not a closure, so that the scheduler's state holds ``num_steps``."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def __call__(self, t: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(t / self.num_steps, 1.0)))


def _check_arguments(tensors, epochs, batch_size, state, generator, every, drop_last) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer, at least 1, got {value!r}")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"checkpoint_every must be an integer, at least 1 step, got {every!r}")
    if not tensors or not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors):
        raise TypeError("data must be a tensor [N, ...] or a tuple of such tensors")
    if len({len(t) for t in tensors}) > 1 or len({t.device for t in tensors}) > 1:
        found = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
        raise ValueError(f"data must agree in the first dimension and the device, got {found}")
    if len(tensors[0]) < (batch_size if drop_last else 1):
        raise ValueError(
            f"data has {len(tensors[0])} examples, fewer than one batch of {batch_size}; "
            "use a smaller batch_size or drop_last=False"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"generator shuffles on the CPU, got one on {generator.device}")
    for name, thing in state.items():
        known = isinstance(thing, Tensor | torch.Generator)
        if not known and not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise TypeError(
                f"state[{name!r}] is a {type(thing).__name__}; it must be a tensor, a generator, "
                "or have state_dict and load_state_dict"
            )


class _LossRecord:
    """The losses of each step. Rows wait on their device, so that it need not be waited for."""

    def __init__(self, total_steps: int):
        self.total_steps, self.num_rows = total_steps, 0
        self.names: list[str] = []
        self.values = torch.empty(total_steps, 0)
        self.pending: list[Tensor] = []

    def restore(self, names: list[str], values: Tensor) -> None:
        self._start(names, values.dtype)
        self.num_rows = len(values)
        self.values[: len(values)] = values

    def _start(self, names: list[str], dtype: torch.dtype) -> None:
        self.names = names
        self.values = torch.empty(self.total_steps, len(names), dtype=dtype)

    def add(self, losses: Mapping[str, Tensor], last_saved: Path | None) -> None:
        row = self._row(losses)
        self.pending.append(row)
        if row.device.type == "cpu" or len(self.pending) >= _LOSSES_KEPT_ON_DEVICE:
            self.flush(last_saved)

    def _row(self, losses: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(losses, Mapping) or not losses:
            raise TypeError(f"step must return a dictionary of scalar losses, got {losses!r}")
        if not self.names:
            first = torch.as_tensor(next(iter(losses.values())))
            self._start(list(losses), first.dtype if first.is_floating_point() else torch.float32)
        if list(losses) != self.names:
            raise ValueError(f"step returned losses {list(losses)}, before {self.names}")
        device = next((v.device for v in losses.values() if isinstance(v, Tensor)), None)
        values = [torch.as_tensor(value, device=device).detach() for value in losses.values()]
        for name, value in zip(self.names, values, strict=True):
            if value.numel() != 1:
                raise ValueError(f"loss {name!r} must be a scalar, got shape {list(value.shape)}")
        # A copy, because a step that replays a CUDA graph writes to the same tensors each time.
        return torch.stack([value.reshape(()) for value in values])

    def flush(self, last_saved: Path | None) -> None:
        if not self.pending:
            return
        rows = torch.stack(self.pending).to("cpu", self.values.dtype)
        self.pending = []
        start, self.num_rows = self.num_rows, self.num_rows + len(rows)
        self.values[start : self.num_rows] = rows
        if not torch.isfinite(rows).all():
            row, column = (~torch.isfinite(rows)).nonzero()[0].tolist()
            what = f"loss {self.names[column]!r} is {rows[row, column].item()}"
            raise _non_finite(what, start + row + 1, last_saved)

    def latest(self, last_saved: Path | None) -> dict[str, str]:
        self.flush(last_saved)
        latest = self.values[self.num_rows - 1].tolist()
        return {name: f"{value:.4g}" for name, value in zip(self.names, latest, strict=True)}


def _finite(tree: object, step: int, last_saved: Path | None) -> object:
    """Return the state of the objects, after making sure that it may be saved."""
    tensors: dict[str, Tensor] = {}
    _flatten(tree, "", tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _non_finite(f"tensor {name} of the state is not finite", step, last_saved)
    return tree


def _non_finite(what: str, step: int, last_saved: Path | None) -> NonFiniteError:
    kept = f"last good checkpoint: {last_saved}" if last_saved else "there is no checkpoint yet"
    return NonFiniteError(f"step {step}: {what} ({kept})", step, last_saved)


# --- state ---------------------------------------------------------------------------------------


def _read_state(state: Mapping[str, object]) -> dict[str, object]:
    def read(thing):
        if isinstance(thing, Tensor):
            return thing.detach()
        return thing.get_state() if isinstance(thing, torch.Generator) else thing.state_dict()

    return {name: read(thing) for name, thing in state.items()}


def _write_state(state: Mapping[str, object], saved: Mapping[str, object]) -> None:
    # Checkpoints are read on the CPU. What a learning rate in a tensor needs is its old device.
    present: dict[str, Tensor] = {}
    _flatten(_read_state(state), "", present)
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(saved, "", tensors)
    for name in tensors.keys() & present:
        tensors[name] = tensors[name].to(present[name].device)
    saved = _unflatten(skeleton, tensors)
    for name, thing in state.items():
        if isinstance(thing, Tensor):
            with torch.no_grad():
                thing.copy_(saved[name])
        elif isinstance(thing, torch.Generator):
            thing.set_state(saved[name])
        else:
            thing.load_state_dict(saved[name])


def _read_random_state() -> dict[str, Tensor]:
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        random["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        random["mps"] = torch.mps.get_rng_state()
    return random


def _write_random_state(random: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    if "mps" in random:
        torch.mps.set_rng_state(random["mps"])


def _layout_of(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)


def _layout(tree: object) -> dict[str, str]:
    """What a tree looks like: shapes and types of its tensors, values of its other leaves."""
    leaves: dict[str, object] = {}
    _flatten(tree, "", {}, leaves)
    return {path: _layout_of(leaf) for path, leaf in leaves.items()}


def _check_same_run(path, saved, settings, layout, total_steps) -> None:
    """Refuse a checkpoint of another run.

    The objects must look as they did when the run began. Only what training itself has changed
    since (a scheduler's step count, an optimiser's moments) may look otherwise: it is overwritten.
    """
    began, found = saved["initial_layout"], _layout(saved["state"])
    constant = {k: began.get(k) for k in began.keys() | layout if began.get(k) == found.get(k)}
    before = _layout(saved["settings"]) | {f"state.{k}": v for k, v in constant.items()}
    now = _layout(settings) | {f"state.{k}": layout.get(k) for k in constant}
    differences = [
        f"{name}: {before.get(name) or 'absent'} in the checkpoint, {now.get(name) or 'absent'} now"
        for name in sorted(before.keys() | now)
        if before.get(name) != now.get(name)
    ]
    if saved["done"] > total_steps:
        differences.append(f"steps: {saved['done']} done already, {total_steps} asked for now")
    if differences:
        shown = "\n  ".join(differences[:10] + ["..."] * (len(differences) > 10))
        raise CheckpointError(
            f"checkpoint {path} is of a different run; remove it to start afresh:\n  {shown}"
        )


# --- files ---------------------------------------------------------------------------------------


def write_checkpoint(path: Path, tree: Mapping[str, object]) -> None:
    """Write a tree of dictionaries, lists, tensors and plain values in the safetensors format.

    The file appears under its name only when it is complete and on the disk; the file that had the
    name before is kept as ``.previous``. What is larger than 15 MB lies in parts
    beside the file, which then lists them: copy the folder, and everything is there.

    :param path: where to write it.
    :param tree: what to write. Keys are strings or integers.
    :raises TypeError: if the tree holds something else.
    :raises OSError: if the file cannot be written; what was there before is intact.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "checkpoint"
    ...     write_checkpoint(path, {"step": 3, "betas": [(0.9, 0.999)], 0: torch.ones(2)})
    ...     read_checkpoint(path)
    {'step': 3, 'betas': [(0.9, 0.999)], 0: tensor([1., 1.])}
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_flatten(tree, "", tensors))
    tensors = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    digest = _digest(skeleton, tensors)
    content = format_safetensors(tensors, {"format": _FORMAT, "tree": skeleton, "sha256": digest})
    parts: dict[str, bytes] = {}
    if len(content) > MAX_FILE_BYTES:
        for start in range(0, len(content), MAX_FILE_BYTES):
            name = f"{path.name}.{digest[:16]}.part{len(parts)}"  # which no other tree has
            parts[name] = content[start : start + MAX_FILE_BYTES]
        content = json.dumps({"parts": list(parts)}).encode()
    temporary = _beside(path, ".tmp")
    try:
        for name, part in parts.items():
            file = path.with_name(name)
            if not file.exists() or file.read_bytes() != part:  # an equal tree may be using it
                _write_to_disk(file, part)
        _write_to_disk(temporary, content)
        if path.exists():
            os.replace(path, _beside(path, ".previous"))
        os.replace(temporary, path)
        _remove_unused_parts(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            _remove_unused_parts(path)
        raise OSError(
            error.errno or errno.EIO,
            f"cannot write the checkpoint ({error.strerror}); the one before it is intact",
            str(path),
        ) from error


def _write_to_disk(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _part_names(content: bytes) -> list[str]:
    """The files that a checkpoint lists; none where it is whole and begins with a binary number."""
    return json.loads(content)["parts"] if content.startswith(b'{"parts"') else []


def _remove_unused_parts(path: Path) -> None:
    used: set[str] = set()
    for head in (path, _beside(path, ".previous")):
        with contextlib.suppress(FileNotFoundError, ValueError):  # one that is damaged has no parts
            used.update(_part_names(head.read_bytes()))
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part*"):
        if part.name not in used:
            part.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict | None:
    """Read what :func:`write_checkpoint` wrote; ``None`` if there is nothing.

    A file that is damaged is replaced by the one before it, with a warning.

    :param path: where it was written.
    :return: the tree, with its tensors on the CPU.
    :raises CheckpointError: if the file is damaged and there is none before it.
    """
    path, previous = Path(path), _beside(Path(path), ".previous")
    if not path.exists() and not previous.exists():
        return None
    try:
        if path.exists():
            return _parse(path)
        problem = f"{path} is missing"  # killed between two renamings
    except CheckpointError as error:
        if not previous.exists():
            raise CheckpointError(f"{error}; remove it to start afresh") from error
        problem = str(error)
    try:
        tree = _parse(previous)
    except CheckpointError as error:
        raise CheckpointError(f"{problem}; {error}; remove both to start afresh") from error
    warnings.warn(f"{problem}; going on from the checkpoint before it", stacklevel=3)
    os.replace(previous, path)
    return tree


_SIGNS_OF_DAMAGE = (
    SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    FileNotFoundError,  # a part is missing, or the list of them is damaged
    NotADirectoryError,
)


def _parse(path: Path) -> dict:
    content = path.read_bytes()
    try:
        names = _part_names(content)
        if names:
            content = b"".join(path.with_name(name).read_bytes() for name in names)
        tensors = parse_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        version = metadata["format"]
        skeleton = metadata["tree"]
        intact = metadata["sha256"] == _digest(skeleton, tensors)
    except _SIGNS_OF_DAMAGE as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint ({error!r})") from error
    if version != _FORMAT:
        raise CheckpointError(f"{path} has format {version}, this is format {_FORMAT}")
    if not intact:
        raise CheckpointError(f"{path} is damaged (its digest does not match)")
    return _unflatten(json.loads(skeleton), tensors)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _digest(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(skeleton.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _flatten(tree, path: str, tensors: dict[str, Tensor], leaves: dict | None = None):
    """Collect the tensors of a tree by path and return the rest of it as JSON values."""

    def below(key, value):
        return _flatten(value, f"{path}.{key}" if path else str(key), tensors, leaves)

    if isinstance(tree, Mapping):
        if not all(isinstance(key, str | int) for key in tree):
            raise TypeError(f"keys of {path} must be strings or integers")
        return {"dict": [[key, below(key, value)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [below(key, value) for key, value in enumerate(tree)]}
    if leaves is not None:
        leaves[path] = tree
    if isinstance(tree, Tensor):
        tensors[path] = tree
        # A format such as channels last is kept: another one may round sums differently.
        dense = torch.empty_like(tree, device="meta").stride() == tree.stride()
        return {"tensor": [path, list(tree.stride()) if dense else None]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"{path} is a {type(tree).__name__}, which a checkpoint cannot hold")


def _unflatten(skeleton, tensors: Mapping[str, Tensor]):
    ((kind, content),) = skeleton.items()
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        items = [_unflatten(value, tensors) for value in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "value":
        return content
    path, stride = content
    tensor = tensors[path]
    if stride is None or tuple(stride) == tensor.stride():
        return tensor
    return torch.empty_strided(
        tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


@contextlib.contextmanager
def checkpoint_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a checkpoint. The system lets go of it when the process ends, however.

    :param path: the checkpoint; the lock is a file beside it.
    :raises CheckpointLockedError: if another process holds it.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, checkpoint_lock(Path(folder) / "checkpoint"):
    ...     print(*os.listdir(folder))
    checkpoint.lock
    """
    import fcntl  # POSIX; training without a checkpoint works anywhere

    lock = _beside(Path(path), ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(lock, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise CheckpointLockedError(
                f"checkpoint {path} is in use by {owner}; wait for it to end or stop it"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        file.close()  # its owner removed the file between our opening and our locking it
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()
