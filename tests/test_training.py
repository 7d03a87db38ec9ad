"""The loop: exact resume however it is interrupted, and faults that are named."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from amortised import training
from amortised.files import DamagedFileError, OutOfTimeError, Work, load_tree
from amortised.training import NonFiniteError, cosine_decay, fit, gradient_step, half_cosine
from tiny import KILLS, SEED

NUM_STEPS = 15
FEWEST = {1: 20, 2: 7, 3: 4, 5: 1}  # checkpoints, at least, for one every so many steps
CHECKPOINT = "work-checkpoint.stage"

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Run:
    """A small run with everything that a resume can get wrong: dropout and noise from the global
    stream, decaying rates, the moments of two optimisers, channels-last weights, a table of chains.
    """

    def __init__(self, lr=0.02, device="cpu"):
        torch.manual_seed(0)
        self.data = (torch.randn(22, 2, 3, 3, device=device), torch.arange(22, device=device))
        layers = nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 1)
        self.net = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
        self.shift = torch.zeros(3, requires_grad=True, device=device)
        self.chains = torch.zeros(22, 3, device=device)
        settings = {"lr": lr, "capturable": device == "cuda"}
        self.adam = torch.optim.Adam(self.net.parameters(), **settings)
        self.sgd = torch.optim.SGD([self.shift], lr=0.1, momentum=0.9)
        names = ("net", "shift", "chains", "adam", "sgd")
        self.state = {name: getattr(self, name) for name in names}
        self.num_calls, self.interrupt_at = 0, None

    def step(self, x, index):
        self.num_calls += 1
        z = self.chains[index] + torch.randn(len(x), 3, device=x.device)
        self.chains[index] = 0.9 * z
        if self.num_calls == self.interrupt_at:  # in the middle of an update
            raise KeyboardInterrupt
        x = x.to(memory_format=torch.channels_last) + 0.1 * (z + self.shift).mean()
        loss = (self.net(x).squeeze(-1) - x.sum((1, 2, 3))).square().mean()
        for optimizer in (self.adam, self.sgd):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (self.adam, self.sgd):
            optimizer.step()
        return {"loss": loss, "noise": torch.randn(()).abs()}

    def fit(self, folder=None, stop_at=math.inf, **options):
        defaults = {"epochs": 3, "batch_size": 4, "seed": 5, "schedule": half_cosine}
        arguments = {"data": self.data, "state": self.state} | defaults | options
        self.result = fit(self.step, work=Work(folder, stop_at=stop_at), **arguments)
        return self

    def left(self):
        """All that a run leaves behind."""
        state = training._read_state(self.state, 0, None)
        rates = torch.tensor([float(o.param_groups[0]["lr"]) for o in (self.adam, self.sgd)])
        tree = [state, rates, self.result.history, training._read_random_state()]
        return dict(training._tensors(tree, "")) | {"steps": torch.tensor(self.result.num_steps)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        assert value.stride() == expected[name].stride(), name


@pytest.fixture(scope="module")
def whole():
    """What a run leaves behind that was left alone."""
    return Run().fit().left()


def interrupted(folder, at=9, **options):
    run = Run(**options)
    run.interrupt_at = at
    with pytest.raises(KeyboardInterrupt):
        run.fit(folder)
    return run


# --- the loop ------------------------------------------------------------------------------------


def visited(num_examples, batch_size, epochs, seed):
    batches = []

    def step(index):
        batches.append(index.tolist())
        return {"loss": torch.zeros(())}

    data = torch.arange(num_examples)
    fit(step, data, {}, epochs=epochs, batch_size=batch_size, seed=seed)
    return batches


@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_of_the_examples_is_a_function_of_the_seed_and_the_epoch(seed):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(10, generator=generator).tolist() for _ in range(3)]
    expected = [order[start : start + 4] for order in orders for start in (0, 4)]
    torch.manual_seed(3)  # of the global stream, which does not matter
    assert visited(10, 4, 3, seed) == expected
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]


def test_the_history_has_each_step():
    losses = itertools.count()
    step = lambda x: {"loss": torch.tensor(float(next(losses))), "other": 2.0}  # noqa: E731
    result = fit(step, torch.zeros(7, 1), {}, epochs=2, batch_size=2)
    assert result.history["loss"].tolist() == [0, 1, 2, 3, 4, 5]
    assert result.history["other"].tolist() == [2] * 6
    assert (result.num_steps, result.steps_per_epoch) == (6, 3) and result.seconds > 0


def test_gradient_step_reduces_and_advances_the_schedule():
    z = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=0.5)
    step = gradient_step(lambda x: z * x, optimizer, cosine_decay(optimizer, 2))
    assert step(torch.tensor([1.0, 3.0]))["loss"] == 2.0
    assert z.item() == 0.0 and optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"returned \['bound'\]; one entry must be named 'loss'"):
        gradient_step(lambda x: {"bound": x}, optimizer)(torch.zeros(1))


def test_a_progress_bar_is_shown_on_a_terminal_only(capsys, monkeypatch):
    Run().fit()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    Run().fit()
    shown = capsys.readouterr().err
    assert "15/15" in shown and "steps/s" in shown


# --- learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_rates_are_half_a_cosine_by_either_schedule(lr):
    rates = {}
    for name in ("schedule", "scheduler"):
        z = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([z], lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
        rates[name] = seen = []
        state, options, scheduler = {"optimizer": optimizer}, {"schedule": half_cosine}, None
        if name == "scheduler":
            options, scheduler = {}, cosine_decay(optimizer, 8)

        def loss(x, z=z, optimizer=optimizer, seen=seen):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            return z.square().sum()

        step = gradient_step(loss, optimizer, scheduler)
        fit(step, torch.zeros(8), state, epochs=2, batch_size=2, **options)
    expected = [0.15 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert rates["schedule"] == pytest.approx(expected, abs=1e-7)
    if isinstance(lr, float):
        assert (
            rates["schedule"] == rates["scheduler"] == [lr * half_cosine(t / 8) for t in range(8)]
        )
    assert rates["scheduler"] == pytest.approx(expected, abs=1e-7)


def test_rates_are_left_alone_without_a_schedule_and_stay_at_zero_at_the_end():
    run = Run().fit(schedule=None)
    assert run.adam.param_groups[0]["lr"] == 0.02
    assert [half_cosine(s) for s in (0.0, 0.5, 1.0, 3.0)] == pytest.approx(
        [1, 0.5, 0, 0], abs=1e-12
    )
    with pytest.raises(ValueError, match="num_steps must be an integer, at least 1; got 0"):
        cosine_decay(run.adam, 0)


# --- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer, at least 1; got 0"),
        ({"epochs": True}, "epochs must be an integer"),
        ({"batch_size": 2.0}, "batch_size must be an integer"),
        ({"batch_size": 23}, "22 examples, fewer than one batch of 23; use a smaller batch_size"),
        ({"data": (torch.zeros(3), torch.zeros(4))}, r"first dimension .*\[3\] on cpu, \[4\] on"),
        ({"data": [torch.zeros(3)]}, "data must be a tensor"),
        ({"data": (torch.zeros(()),)}, "data must be a tensor"),
        ({"data": ()}, "data must be a tensor"),
        ({"state": {"net": 3}}, r"state\['net'\] is a int"),
    ],
)
def test_bad_arguments_are_named_before_any_work(tmp_path, change, message):
    run = Run()
    with pytest.raises((ValueError, TypeError), match=message):
        run.fit(tmp_path, **change)
    assert run.num_calls == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.zeros(()), TypeError, "must return a dictionary of scalar losses, got tensor"),
        ({}, TypeError, "must return a dictionary of scalar losses, got {}"),
        ({"loss": torch.zeros(3)}, ValueError, r"'loss' must be a scalar, got shape \[3\]"),
        ({"a": 0.0}, ValueError, r"step returned losses \['a'\], before \['loss'\]"),
    ],
)
def test_a_step_must_return_the_same_scalars_each_time(losses, error, message):
    returned = iter([{"loss": 0.0}, losses])
    with pytest.raises(error, match=message):
        fit(lambda x: next(returned), torch.zeros(2), {}, epochs=1, batch_size=1)


# --- exact resume --------------------------------------------------------------------------------


def test_a_checkpoint_changes_nothing(tmp_path, whole):
    assert_same(Run().fit(tmp_path).left(), whole)
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, f"{CHECKPOINT}.previous"}
    again = Run().fit(tmp_path)  # it is finished: the result is there
    assert again.num_calls == 0
    assert_same(again.left(), whole)


def test_stopped_by_time_it_makes_a_step_at_each_call(tmp_path, whole):
    for done in range(1, NUM_STEPS):
        with pytest.raises(OutOfTimeError, match=f"out of time: {done} of 15 steps of work are"):
            Run().fit(tmp_path, stop_at=0.0)
    run = Run().fit(tmp_path, stop_at=0.0)
    assert run.num_calls == 1
    assert_same(run.left(), whole)


@pytest.mark.parametrize("every", FEWEST)
@pytest.mark.parametrize("at", [2, 5, 6, 8, 11, 15])  # steps 5, 10 and 15 end an epoch
def test_interrupted_within_a_step(tmp_path, monkeypatch, whole, at, every):
    monkeypatch.setattr(training, "_FEWEST_CHECKPOINTS", FEWEST[every])
    interrupted(tmp_path, at)
    run = Run().fit(tmp_path)
    assert run.num_calls == NUM_STEPS - (at - 1) // every * every
    assert_same(run.left(), whole)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_interrupted_twice_and_with_rates_in_tensors(tmp_path, monkeypatch, device):
    monkeypatch.setattr(training, "_FEWEST_CHECKPOINTS", FEWEST[2])

    def where():
        return {"device": device, "lr": torch.tensor(0.02, device=device)}

    expected = Run(**where()).fit().left()
    interrupted(tmp_path, 4, **where())
    interrupted(tmp_path, 6, **where())  # of its own steps, which begin with the third
    run = Run(**(settings := where())).fit(tmp_path)
    assert run.num_calls == NUM_STEPS - 6
    assert_same(run.left(), expected)
    assert run.adam.param_groups[0]["lr"] is settings["lr"]  # where a captured graph reads it


def test_interrupted_it_goes_on_with_the_same_objects(tmp_path, monkeypatch, whole):
    """As in a notebook: the cell is stopped, then run again, and the objects live on."""
    monkeypatch.setattr(training, "_FEWEST_CHECKPOINTS", FEWEST[5])
    run = interrupted(tmp_path)
    assert_same(run.fit(tmp_path).left(), whole)
    assert run.num_calls == 9 + NUM_STEPS - 5


def momentum_by_hand(folder: Path, work: Work, seconds: float) -> None:
    """300 steps that need no autograd, which a forked process may lack."""
    torch.manual_seed(0)
    weight, velocity, data = torch.randn(4, 32), torch.zeros(4, 32), torch.randn(64, 4)
    log = os.open(folder / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(x):
        os.write(log, b".")
        time.sleep(seconds)
        residual = (x + torch.randn(x.shape)) @ weight - 1
        velocity.mul_(0.9).add_(x.T @ residual, alpha=-0.01)
        weight.add_(velocity)
        return {"loss": residual.square().mean()}

    state = {"weight": weight, "velocity": velocity}
    fit(step, data, state, epochs=60, batch_size=12, work=work)


@pytest.mark.parametrize("num_kills", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_at_random_moments(tmp_path, num_kills):
    moments, kills = random.Random(SEED), 0
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    momentum_by_hand(tmp_path / "whole", Work(tmp_path / "whole"), 0.001)
    seconds = time.monotonic() - started
    expected = load_tree(tmp_path / "whole" / CHECKPOINT)
    for number in itertools.count():
        folder, code, lost = tmp_path / str(number), None, 0
        folder.mkdir()
        while code != 0:
            if (process := os.fork()) == 0:
                momentum_by_hand(folder, Work(folder), 0.001)
                os._exit(0)
            if kills < num_kills:
                time.sleep(moments.uniform(0, seconds / 3))
                os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            kills, lost = kills + (code != 0), lost + (code != 0)
        KILLS["SIGKILL"], KILLS["trainings"] = KILLS["SIGKILL"] + lost, KILLS["trainings"] + lost
        found = load_tree(folder / CHECKPOINT)
        for name in ("weight", "velocity"):
            assert torch.equal(found["state"][name], expected["state"][name])
        assert torch.equal(found["losses"], expected["losses"])
        # A kill loses the steps since the last checkpoint, and that which was being written.
        assert 0 <= (folder / "steps").stat().st_size - 300 <= lost * 2 * 5
        if kills == num_kills:
            break


# --- checkpoints that cannot be gone on from -----------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(training, "_FEWEST_CHECKPOINTS", FEWEST[3])
    interrupted(tmp_path)
    damage(tmp_path / CHECKPOINT)
    run = Run()
    with pytest.warns(UserWarning, match=r"is damaged .*; going on from the one before it"):
        run.fit(tmp_path)
    assert run.num_calls == NUM_STEPS - 3
    assert_same(run.left(), whole)
    damage(tmp_path / CHECKPOINT)
    damage(tmp_path / f"{CHECKPOINT}.previous")
    with pytest.raises(DamagedFileError, match="remove both to start afresh"):
        Run().fit(tmp_path)


def test_a_write_error_keeps_the_checkpoint_before(tmp_path, monkeypatch, whole):
    interrupted(tmp_path)

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", no_space)
        Run().fit(tmp_path)
    run = Run()
    with pytest.warns(UserWarning, match="is missing; going on from the one before it"):
        run.fit(tmp_path)
    assert run.num_calls == NUM_STEPS - 8
    assert_same(run.left(), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": (torch.zeros(21, 2, 3, 3), torch.arange(21))}, "examples 22, now 21"),
        ({"batch_size": 5}, "batch_size 4, now 5; steps 15, now 12"),
        ({"seed": 6}, "seed 5, now 6"),
        ({"epochs": 4}, "steps 15, now 20"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_by_what_differs(tmp_path, change, message):
    interrupted(tmp_path)
    kept, run = (tmp_path / CHECKPOINT).read_bytes(), Run()
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} is of a different .*: {message}"):
        run.fit(tmp_path, **change)
    assert run.num_calls == 0 and (tmp_path / CHECKPOINT).read_bytes() == kept


# --- numbers that are none -----------------------------------------------------------------------


def diverge(run: Run, how: object) -> None:
    """At its ninth step, a loss or a tensor of the state is no number, or the step says so."""
    good = run.step

    def step(*batch):
        losses = good(*batch)
        if run.num_calls != 9:
            return losses
        if isinstance(how, float):
            return losses | {"noise": torch.tensor(how)}
        if how == "state":
            run.adam.state[run.net[3].bias]["exp_avg"].fill_(math.nan)
            return losses
        raise FloatingPointError(how)

    run.step = step


@pytest.mark.parametrize(
    ("how", "step", "what"),
    [
        (math.nan, 9, "loss 'noise' is nan"),
        (math.inf, 9, "loss 'noise' is inf"),
        ("the chain left the numbers", 9, "the chain left the numbers"),
        ("state", 9, "tensor adam.state.3.exp_avg of the state is not finite"),
    ],
)
@pytest.mark.parametrize("is_kept", [True, False])
def test_what_is_not_finite_stops_the_training_and_is_not_kept(
    tmp_path, monkeypatch, how, step, what, is_kept
):
    monkeypatch.setattr(training, "_FEWEST_CHECKPOINTS", FEWEST[3])
    run = Run()
    diverge(run, how)
    with pytest.raises(NonFiniteError) as caught:
        run.fit(tmp_path if is_kept else None)
    error, checkpoint = caught.value, tmp_path / CHECKPOINT
    where = f"last good checkpoint: {checkpoint}" if is_kept else "there is no checkpoint yet"
    assert str(error) == f"step {step}: {what} ({where})" and error.step == step
    assert isinstance(error, FloatingPointError)
    assert error.checkpoint == (checkpoint if is_kept else None)
    assert not is_kept or load_tree(checkpoint)["done"] == 6


def test_losses_that_wait_on_a_device_are_traced_to_their_step():
    losses = training._Losses()
    for step in range(1, 41):
        losses.add({"a": torch.tensor(1.0), "b": torch.tensor(math.nan if step == 31 else 1.0)})
        if step == 20:
            losses.look(20, None, always=True)
            assert losses.values().shape == (20, 2)
    with pytest.raises(NonFiniteError, match="step 31: loss 'b' is nan"):
        losses.look(40, None, always=True)
