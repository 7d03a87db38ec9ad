r"""One training loop, from which an interrupted run goes on exactly.

:func:`fit` visits the data in shuffled minibatches and calls ``step`` on each. What a step does is
the caller's business: one optimiser or three, a game, a Markov chain for each image. The common
case, gradient descent on one loss, is made by :func:`gradient_step`.

The order of the images is a function of the seed and the epoch, the place in it one of the number
of steps done, and a learning rate one of the share of steps done. So a checkpoint holds only what
the steps have changed: the state of each named object, the state of the global random number
generators, and the losses. A run that is stopped at any moment, by ``kill -9`` for instance, and
started again with the same arguments ends with the same parameters, to the last bit, as a run that
was left alone (on the same machine, with deterministic kernels).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from .files import Work, save_tree
from .numerics import check_counts, check_seed

Step = Callable[..., Mapping[str, Tensor]]

_STREAMS = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}  # where their random state is kept
_STEPS_ON_DEVICE = 64  # steps between two looks at the losses of an accelerator
_FEWEST_CHECKPOINTS = 20  # in a training; more where an epoch is shorter


class FitResult(NamedTuple):
    """What a training did, over all its parts if it was interrupted.

    :ivar history: the value of each loss at each step, ``[num_steps]``, on the CPU.
    :ivar num_steps: steps done.
    :ivar steps_per_epoch: steps in one pass over the data.
    :ivar seconds: wall time spent in training.
    """

    history: dict[str, Tensor]
    num_steps: int
    steps_per_epoch: int
    seconds: float


class NonFiniteError(FloatingPointError):
    """Training produced an infinity or a nan; a checkpoint on disk is from before it.

    :ivar step: number of the step, counted from 1.
    :ivar checkpoint: path of the last good checkpoint, or ``None``.
    """

    def __init__(self, what: str, step: int, checkpoint: Path | None):
        kept = f"last good checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"step {step}: {what} ({kept})")
        self.step, self.checkpoint = step, checkpoint


# --- the loop ------------------------------------------------------------------------------------


def fit(
    step: Step,
    data: Tensor | tuple[Tensor, ...],
    state: Mapping[str, object],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    schedule: Callable[[float], float] | None = None,
    work: Work = Work(),
) -> FitResult:
    r"""Train for a number of passes over the data, or go on with a training that was interrupted.

    :param step: ``step(*batch)`` makes one update and returns a dictionary of scalar losses to
        record, always with the same names. It is first called after a checkpoint has been read, so
        a step that captures a CUDA graph should do so in its first call.
    :param data: a tensor ``[N, ...]``, or a tuple of tensors on one device with the same ``N``.
        Batches are slices of it on that device. The last ``N % batch_size`` examples of an epoch,
        others in each, are left out.
    :param state: everything that ``step`` changes, by name: modules, optimisers and other objects
        with ``state_dict`` and ``load_state_dict``, or tensors (restored in place). The global
        generators of PyTorch are included without being named; other generators are not.
    :param epochs: passes over the data, in all.
    :param batch_size: examples in a batch.
    :param seed: of the order of the examples, which is drawn anew in each epoch.
    :param schedule: maps the share of steps done, in [0, 1), to a factor for the learning rates of
        all optimisers in ``state``; :func:`half_cosine`, for instance. By default they are left.
    :param work: where to keep checkpoints, and when to stop. Of a training that is finished, the
        last checkpoint holds the result.
    :return: a :class:`FitResult`.
    :raises ValueError: if the arguments do not fit together, or a checkpoint is of other data;
        nothing has been done then.
    :raises amortised.files.DamagedFileError: if neither the checkpoint nor the one before it can be
        read.
    :raises amortised.files.OutOfTimeError: when the time to stop has come; there is a checkpoint.
    :raises NonFiniteError: if a loss, or a tensor about to be saved, is not finite, or if ``step``
        raises a ``FloatingPointError``. On the CPU the losses are looked at after each step, on an
        accelerator every 64 steps and before each checkpoint, so that the device need not wait; no
        checkpoint is made of a bad state.
    :raises OSError: if a checkpoint cannot be written.

    >>> data = torch.arange(8.0)
    >>> mean = torch.zeros((), requires_grad=True)
    >>> optimizer = torch.optim.SGD([mean], lr=0.5)
    >>> state = {"mean": mean, "optimizer": optimizer}
    >>> step = gradient_step(lambda x: (x - mean) ** 2, optimizer)
    >>> result = fit(step, data, state, epochs=5, batch_size=8)
    >>> mean.item(), result.num_steps, result.history["loss"][-1].item()
    (3.5, 5, 5.25)
    """
    tensors = data if isinstance(data, tuple) else (data,)
    check_seed(seed)
    _check_data(tensors, epochs, batch_size)
    _check_state(state)
    steps_per_epoch = len(tensors[0]) // batch_size
    total = epochs * steps_per_epoch
    save_every = min(steps_per_epoch, max(1, total // _FEWEST_CHECKPOINTS))
    checkpoint = work.path("checkpoint")
    facts = {"examples": len(tensors[0]), "batch_size": batch_size, "seed": seed, "steps": total}
    optimizers = [thing for thing in state.values() if isinstance(thing, Optimizer)]
    losses, done, seconds, last_saved = _Losses(), 0, 0.0, None

    saved = work.load("checkpoint")
    if saved is not None:
        _check_same(checkpoint, saved["facts"], facts)
        _write_state(state, saved["state"])
        for device, stream in saved["random"].items():
            _STREAMS[device].set_rng_state(stream)
        losses.names, losses.kept = saved["names"], [saved["losses"]]
        done, seconds, last_saved = saved["done"], saved["seconds"], checkpoint

    batches = _batches(tensors[0], batch_size, seed, done)
    started = now = time.monotonic()
    with tqdm(total=total, initial=done, unit=" steps", dynamic_ncols=True, disable=None) as bar:
        while done < total:
            index = next(batches)
            if schedule is not None:
                _scale_learning_rates(optimizers, schedule(done / total))
            try:
                losses.add(step(*(tensor[index] for tensor in tensors)))
            except FloatingPointError as error:  # a Markov chain that diverged, for instance
                raise NonFiniteError(str(error), done + 1, last_saved) from error
            done += 1
            now = time.monotonic()
            is_late = now >= work.stop_at and done < total
            is_due = is_late or done == total or done % save_every == 0
            losses.look(done, last_saved, always=is_due)
            if is_due:
                current = _read_state(state, done, last_saved)
                if checkpoint is not None:
                    progress = {"done": done, "seconds": seconds + now - started, "state": current}
                    content = {"facts": facts, "names": losses.names, "losses": losses.values()}
                    content |= progress | {"random": _read_random_state()}
                    save_tree(checkpoint, content, keep_previous=True)
                    last_saved = checkpoint
            if is_late:
                work.check_time(f"{done} of {total} steps of {work.name} are done")
            bar.update()
    history = dict(zip(losses.names, losses.values().unbind(1), strict=True))
    return FitResult(history, done, steps_per_epoch, seconds + now - started)


def gradient_step(
    loss_fn: Callable[..., Tensor | Mapping[str, Tensor]],
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
) -> Step:
    """Make the ``step`` of :func:`fit` that descends the gradient of one loss.

    :param loss_fn: ``loss_fn(*batch)`` returns the loss, per example or already reduced, or a
        dictionary with an entry ``"loss"`` and others to be recorded. Means are taken here.
    :param optimizer: the optimiser, which holds the parameters.
    :param scheduler: learning-rate schedule that advances at each step; name it in ``state``, too,
        where the training keeps checkpoints.
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


# --- learning rates ------------------------------------------------------------------------------


def half_cosine(share: float) -> float:
    r"""The factor :math:`\tfrac12 \{1 + \cos(\pi s)\}` that falls from 1 to 0, and stays there.

    :param share: s, the share of all steps that is done.

    >>> half_cosine(0.0), round(half_cosine(0.5), 6), half_cosine(2.0)
    (1.0, 0.5, 0.0)
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def cosine_decay(optimizer: Optimizer, num_steps: int) -> LambdaLR:
    r"""The schedule of :func:`half_cosine` for a loop of one's own: call its ``step`` after each
    step of the optimiser.

    :param optimizer: optimiser with the learning rate to start from.
    :param num_steps: steps in which it falls to zero.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    >>> scheduler, rates = cosine_decay(optimizer, num_steps=2), []
    >>> for _ in range(3):
    ...     rates += [round(optimizer.param_groups[0]["lr"], 6)]
    ...     optimizer.step(); scheduler.step()
    >>> rates
    [2.0, 1.0, 0.0]
    """
    check_counts(num_steps=num_steps)
    return LambdaLR(optimizer, lambda t: half_cosine(t / num_steps))


def _scale_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    for group in itertools.chain.from_iterable(o.param_groups for o in optimizers):
        rate = group["lr"]
        initial = group.setdefault("initial_lr", float(rate))
        if isinstance(rate, Tensor):  # on a device, where a captured graph reads it
            rate.fill_(initial * factor)
        else:
            group["lr"] = initial * factor


# --- parts of the loop ---------------------------------------------------------------------------


def _check_data(tensors: tuple[Tensor, ...], epochs: int, batch_size: int) -> None:
    check_counts(epochs=epochs, batch_size=batch_size)
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be trained inside torch.inference_mode(); leave it first")
    if not tensors or not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors):
        raise TypeError("data must be a tensor [N, ...] or a tuple of such tensors")
    if len({len(t) for t in tensors}) > 1 or len({t.device for t in tensors}) > 1:
        found = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
        raise ValueError(f"data must agree in the first dimension and the device, got {found}")
    if len(tensors[0]) < batch_size:
        count = f"{len(tensors[0])} examples, fewer than one batch of {batch_size}"
        raise ValueError(f"data has {count}; use a smaller batch_size")


def _check_state(state: Mapping[str, object]) -> None:
    for name, thing in state.items():
        if not isinstance(thing, Tensor) and not hasattr(thing, "load_state_dict"):
            raise TypeError(
                f"state[{name!r}] is a {type(thing).__name__}; give a tensor or what has state_dict"
            )


def _check_same(path: Path, before: Mapping[str, int], now: Mapping[str, int]) -> None:
    differences = [f"{k} {before[k]}, now {now[k]}" for k in now if before.get(k) != now[k]]
    if differences:
        raise ValueError(
            f"checkpoint {path} is of a different training; remove it: {'; '.join(differences)}"
        )


def _batches(data: Tensor, batch_size: int, seed: int, done: int) -> Iterator[Tensor]:
    """Indices of the examples of each batch after those that are done, on the device of ``data``.

    Each epoch has a new order, and leaves out what does not fill a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    num_used = len(data) // batch_size * batch_size
    while True:
        order = torch.randperm(len(data), generator=generator).to(data.device)
        batches = order[:num_used].split(batch_size)
        yield from batches[done:]
        done = max(0, done - len(batches))


class _Losses:
    """The losses of each step. New ones wait on their device, so that it need not be waited for."""

    def __init__(self):
        self.names: list[str] = []
        self.kept: list[Tensor] = []
        self.waiting: list[Tensor] = []

    def add(self, losses: Mapping[str, Tensor]) -> None:
        if not isinstance(losses, Mapping) or not losses:
            raise TypeError(f"step must return a dictionary of scalar losses, got {losses!r}")
        self.names = self.names or list(losses)
        if list(losses) != self.names:
            raise ValueError(f"step returned losses {list(losses)}, before {self.names}")
        device = next((v.device for v in losses.values() if isinstance(v, Tensor)), None)
        values = [torch.as_tensor(value, device=device).detach() for value in losses.values()]
        for name, value in zip(self.names, values, strict=True):
            if value.numel() != 1:
                raise ValueError(f"loss {name!r} must be a scalar, got shape {list(value.shape)}")
        # A copy, because a step that replays a CUDA graph writes to the same tensors each time.
        self.waiting.append(torch.stack([value.reshape(()) for value in values]))

    def look(self, done: int, last_saved: Path | None, *, always: bool) -> None:
        """Fetch the losses that wait, and see whether they are numbers."""
        if not always and len(self.waiting) < _STEPS_ON_DEVICE and self.waiting[0].is_cuda:
            return
        rows = torch.stack(self.waiting).cpu()
        first, self.waiting = done - len(rows) + 1, []
        self.kept.append(rows)
        if not torch.isfinite(rows).all():
            row, column = (~torch.isfinite(rows)).nonzero()[0].tolist()
            what = f"loss {self.names[column]!r} is {rows[row, column].item()}"
            raise NonFiniteError(what, first + row, last_saved)

    def values(self) -> Tensor:
        """All of them, ``[num_steps, number of losses]``."""
        self.kept = [torch.cat(self.kept)]
        return self.kept[0]


# --- state ---------------------------------------------------------------------------------------


def _read_state(state: Mapping[str, object], done: int, last_saved: Path | None) -> dict:
    """The state of the objects, after making sure that all of it is finite."""
    found = {}
    for name, thing in state.items():
        found[name] = thing.detach() if isinstance(thing, Tensor) else thing.state_dict()
        for key, tensor in _tensors(found[name], name):
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"tensor {key} of the state is not finite", done, last_saved)
    return found


def _tensors(tree: object, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, f"{path}.{key}")


def _write_state(state: Mapping[str, object], saved: Mapping[str, object]) -> None:
    for name, thing in state.items():
        if isinstance(thing, Tensor):
            with torch.no_grad():
                thing.copy_(saved[name])
            continue
        rates = [g["lr"] for g in thing.param_groups] if isinstance(thing, Optimizer) else []
        thing.load_state_dict(saved[name])
        for group, rate in zip(getattr(thing, "param_groups", []), rates, strict=True):
            if isinstance(rate, Tensor):  # checkpoints are read on the CPU; this one stays
                group["lr"] = rate.copy_(group["lr"])


def _read_random_state() -> dict[str, Tensor]:
    devices = ["cpu"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {device: _STREAMS[device].get_rng_state() for device in devices}
