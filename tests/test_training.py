"""The loop: exact resume however it is interrupted, and every bad state of a checkpoint."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amortised import training
from amortised.training import (
    CheckpointError,
    CheckpointLockedError,
    NonFiniteError,
    cosine_decay,
    fit,
    gradient_step,
    read_checkpoint,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def _own_random_stream():
    with torch.random.fork_rng():
        yield


class Run:
    """A small run with everything that a resume can get wrong: dropout and noise from the global
    stream, a decaying rate, Adam's moments, a table of chains, a generator of its own."""

    def __init__(self, seed=0, width=6, lr=0.02, epochs=3, decay=True, num_steps=None):
        torch.manual_seed(seed)
        self.data = (torch.randn(22, 4), torch.arange(22))
        self.epochs = epochs
        self.net = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.Linear(width, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.chains = torch.zeros(22, 4)
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.generator = torch.Generator().manual_seed(seed + 2)
        self.state = {
            "net": self.net,
            "optimizer": self.optimizer,
            "chains": self.chains,
            "noise": self.noise,
        }
        scheduler = None
        if decay:
            scheduler = cosine_decay(self.optimizer, num_steps or epochs * 5)
            self.state["scheduler"] = scheduler
        self._step = gradient_step(self.loss, self.optimizer, scheduler)
        self.num_calls = 0
        self.interrupt_at = None

    def loss(self, x, index):
        z = self.chains[index] + torch.randn(x.shape, generator=self.noise)
        self.chains[index] = 0.9 * z
        return {
            "loss": (self.net(x + 0.1 * z).squeeze(-1) - x.sum(-1)).square(),
            "noise": torch.randn(()).abs(),
        }

    def step(self, *batch):
        self.num_calls += 1
        if self.num_calls == self.interrupt_at:
            self.loss(*batch)  # leave everything in the middle of an update
            raise KeyboardInterrupt
        return self._step(*batch)

    def fit(self, **options):
        options = {"epochs": self.epochs, "batch_size": 4} | options
        return fit(self.step, self.data, state=self.state, generator=self.generator, **options)

    def everything(self):
        """All that a run leaves behind, as one flat dictionary of tensors and values."""
        leaves = {}
        tree = {
            "state": training._read_state(self.state),
            "shuffle": self.generator.get_state(),
            "global": torch.get_rng_state(),
        }
        training._flatten(tree, "", {}, leaves)
        return leaves


def assert_same(run, other, result, other_result):
    left, right = run.everything(), other.everything()
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
        assert same(value, right[name]), name
    assert result.history.keys() == other_result.history.keys()
    for name, values in result.history.items():
        assert torch.equal(values, other_result.history[name])
    assert result.num_steps == other_result.num_steps and result.finished == other_result.finished


@pytest.fixture
def uninterrupted():
    run = Run()
    return run, run.fit()


# --- the loop ------------------------------------------------------------------------------------


def visited(num_examples, batch_size, epochs, seed=0, **options):
    """Batches that a step gets to see, as lists of indices."""
    batches = []

    def step(index):
        batches.append(index.tolist())
        return {"loss": torch.zeros(())}

    fit(
        step,
        torch.arange(num_examples),
        epochs=epochs,
        batch_size=batch_size,
        state={},
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    return batches


def test_each_epoch_visits_each_example_once_in_a_new_order():
    batches = visited(12, 4, epochs=2)
    first, second = [*chain(*batches[:3])], [*chain(*batches[3:])]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert batches == visited(12, 4, epochs=2)
    assert batches != visited(12, 4, epochs=2, seed=1)


def test_last_batch_is_dropped_or_kept():
    assert [len(b) for b in visited(10, 4, epochs=2)] == [4, 4, 4, 4]
    kept = visited(10, 4, epochs=2, drop_last=False)
    assert [len(b) for b in kept] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*kept[:3])) == list(range(10))
    assert [len(b) for b in visited(3, 4, epochs=1, drop_last=False)] == [3]


def test_history_has_each_step_and_epoch_means():
    losses = iter(range(6))
    result = fit(
        lambda x: {"loss": torch.tensor(float(next(losses))), "other": 2.0},
        torch.zeros(7, 1),
        epochs=2,
        batch_size=2,
        state={},
        generator=torch.Generator(),
    )
    assert result.history["loss"].tolist() == [0, 1, 2, 3, 4, 5]
    assert result.history["other"].tolist() == [2] * 6
    assert result.epoch_means("loss").tolist() == [1, 4]
    assert (result.num_steps, result.steps_per_epoch, result.finished) == (6, 3, True)


def test_two_optimisers_in_one_step():
    """Gradient descent-ascent on a b - a^2/2 + b^2/2 ends at the saddle point 0."""
    a, b = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    down, up = torch.optim.SGD([a], lr=0.2), torch.optim.SGD([b], lr=0.2, maximize=True)

    def step(_):
        game = a * b + a.square() / 2 - b.square() / 2
        down.zero_grad()
        up.zero_grad()
        game.backward()
        down.step()
        up.step()
        return {"game": game}

    fit(
        step,
        torch.zeros(10, 1),
        epochs=30,
        batch_size=2,
        state={"a": a, "b": b, "down": down, "up": up},
        generator=torch.Generator(),
    )
    assert max(a.abs().item(), b.abs().item()) < 1e-6


def test_cosine_decay_is_its_closed_form_also_for_a_rate_in_a_tensor():
    for lr in (0.3, torch.tensor(0.3)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler = cosine_decay(optimizer, num_steps=7)
        for t in range(10):
            expected = 0.15 * (1 + math.cos(math.pi * min(t, 7) / 7))
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected, abs=1e-7)
            optimizer.step()
            scheduler.step()
    with pytest.raises(ValueError, match="num_steps"):
        cosine_decay(optimizer, 0)


def test_gradient_step_reduces_and_advances_the_schedule():
    z = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=0.5)
    step = gradient_step(lambda x: z * x, optimizer, cosine_decay(optimizer, 2))
    assert step(torch.tensor([1.0, 3.0]))["loss"] == 2.0
    assert z.item() == 0.0 and optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="'loss'"):
        gradient_step(lambda x: {"bound": x}, optimizer)(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer, at least 1, got 0"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 2.0}, "batch_size must be an integer"),
        ({"batch_size": 23}, "22 examples, fewer than one batch of 23"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"state": {"net": 3}}, r"state\['net'\] is a int"),
        ({"data": (torch.zeros(3), torch.zeros(4))}, r"first dimension.*\[3\].*\[4\]"),
        ({"data": [torch.zeros(3)]}, "data must be a tensor"),
        ({"data": ()}, "data must be a tensor"),
        ({"config": {"rule": object()}}, r"config.rule is a object"),
    ],
)
def test_bad_arguments_are_named_before_any_work(change, message):
    run = Run()
    arguments = dict(data=run.data, state=run.state, epochs=1, batch_size=4)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(run.step, generator=run.generator, **(arguments | change))
    assert run.num_calls == 0
    assert torch.equal(run.net[0].weight, Run().net[0].weight)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.zeros(()), TypeError, "dictionary of scalar losses"),
        ({}, TypeError, "dictionary of scalar losses"),
        ({"loss": torch.zeros(3)}, ValueError, r"'loss' must be a scalar, got shape \[3\]"),
    ],
)
def test_step_must_return_scalars(losses, error, message):
    with pytest.raises(error, match=message):
        fit(
            lambda x: losses,
            torch.zeros(2),
            epochs=1,
            batch_size=1,
            state={},
            generator=torch.Generator(),
        )


def test_progress_bar_only_on_a_terminal(capsys, monkeypatch):
    Run().fit()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    Run().fit()
    shown = capsys.readouterr().err
    assert "samples/s" in shown and "loss=" in shown and "100%" in shown
    Run().fit(progress=False)
    assert capsys.readouterr().err == ""


# --- exact resume --------------------------------------------------------------------------------


def test_a_checkpoint_changes_nothing(tmp_path, uninterrupted):
    run = Run()
    assert_same(run, uninterrupted[0], run.fit(checkpoint=tmp_path / "c"), uninterrupted[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.previous"]


def test_stopped_by_time_after_each_step(tmp_path, uninterrupted):
    for parts in range(1, 100):
        run = Run()
        result = run.fit(checkpoint=tmp_path / "c", max_seconds=0)
        assert (result.num_steps, result.finished) == (parts, parts == 15)
        if result.finished:
            break
    assert_same(run, uninterrupted[0], result, uninterrupted[1])
    assert result.seconds > 0


@pytest.mark.parametrize("every", [1, 2, 7, None])
@pytest.mark.parametrize("interrupt_at", [2, 5, 8, 11, 15])
def test_interrupted_within_a_step(tmp_path, uninterrupted, interrupt_at, every):
    options = {"checkpoint": tmp_path / "c", "checkpoint_every": every}
    run = Run()
    run.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        run.fit(**options)
    assert not (tmp_path / "c.lock").exists()
    run = Run()
    result = run.fit(**options)
    every = every or 5
    assert run.num_calls == 15 - (interrupt_at - 1) // every * every
    assert_same(run, uninterrupted[0], result, uninterrupted[1])


def test_interrupted_run_goes_on_with_the_same_objects(tmp_path, uninterrupted):
    """As in a notebook: the cell is stopped, then run again, and the objects live on."""
    run = Run()
    run.interrupt_at = 9
    with pytest.raises(KeyboardInterrupt):
        run.fit(checkpoint=tmp_path / "c")
    result = run.fit(checkpoint=tmp_path / "c")
    assert_same(run, uninterrupted[0], result, uninterrupted[1])


def test_learning_rate_in_a_tensor_resumes_too(tmp_path):
    whole = Run(lr=torch.tensor(0.02))
    expected = whole.fit()
    parts = Run(lr=torch.tensor(0.02))
    parts.interrupt_at = 8
    with pytest.raises(KeyboardInterrupt):
        parts.fit(checkpoint=tmp_path / "c", checkpoint_every=3)
    parts = Run(lr=torch.tensor(0.02))
    result = parts.fit(checkpoint=tmp_path / "c", checkpoint_every=3)
    assert_same(parts, whole, result, expected)


def test_smaller_last_batch_resumes_too(tmp_path):
    whole = Run()
    expected = whole.fit(drop_last=False)
    parts = Run()
    parts.interrupt_at = 12
    with pytest.raises(KeyboardInterrupt):
        parts.fit(drop_last=False, checkpoint=tmp_path / "c", checkpoint_every=4)
    parts = Run()
    result = parts.fit(drop_last=False, checkpoint=tmp_path / "c", checkpoint_every=4)
    assert_same(parts, whole, result, expected)


def test_resume_keeps_the_memory_format(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten())
        net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        result = fit(
            gradient_step(lambda x: net(x).square().sum(-1), optimizer),
            torch.randn(12, 3, 8, 8),
            epochs=4,
            batch_size=3,
            state={"net": net, "optimizer": optimizer},
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        return optimizer.state[net[0].weight]["exp_avg"], net, result

    expected_moment, expected_net, expected = run()
    moment, net, result = run(checkpoint=tmp_path / "c", max_seconds=0)
    while not result.finished:
        moment, net, result = run(checkpoint=tmp_path / "c", max_seconds=0)
    assert moment.is_contiguous(memory_format=torch.channels_last)
    assert moment.stride() == expected_moment.stride() and torch.equal(moment, expected_moment)
    assert all(map(torch.equal, net.parameters(), expected_net.parameters()))
    assert torch.equal(result.history["loss"], expected.history["loss"])


def test_finished_run_loads_and_can_be_trained_on(tmp_path):
    checkpoint = tmp_path / "c"
    Run(decay=False, epochs=2).fit(checkpoint=checkpoint)
    again = Run(decay=False, epochs=2)
    result = again.fit(checkpoint=checkpoint)
    assert again.num_calls == 0 and result.finished and len(result.history["loss"]) == 10
    whole = Run(decay=False, epochs=4)
    expected = whole.fit()
    more = Run(decay=False, epochs=4)
    result = more.fit(checkpoint=checkpoint)
    assert more.num_calls == 10
    assert_same(more, whole, result, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_resume_on_a_gpu(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        weight = torch.randn(8, 1, device="cuda", requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.01).cuda(), capturable=True)
        scheduler = cosine_decay(optimizer, 60)

        def loss(x):
            return (x @ weight + torch.randn(len(x), 1, device="cuda")).square()

        data = torch.randn(40, 8, device="cuda")
        state = {"weight": weight, "optimizer": optimizer, "scheduler": scheduler}
        result = fit(
            gradient_step(loss, optimizer, scheduler),
            data,
            epochs=6,
            batch_size=4,
            state=state,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        return weight, result

    expected_weight, expected = run()
    while True:
        weight, result = run(checkpoint=tmp_path / "c", max_seconds=0)
        if result.finished:
            break
    assert torch.equal(weight, expected_weight)
    assert torch.equal(result.history["loss"], expected.history["loss"])


# Momentum by hand: importing an optimiser would take longer than the run.
KILLED_RUN = textwrap.dedent(
    """
    import sys, time
    import torch
    from safetensors.torch import save_file
    from amortised.training import fit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight, velocity = torch.randn(4, 32), torch.zeros(4, 32)

    def step(x):
        if len(sys.argv) > 2:
            time.sleep(0.002)  # long enough to be killed in, also on a fast machine
        print("step", flush=True)
        residual = (x + torch.randn(x.shape)) @ weight - 1
        velocity.mul_(0.9).add_(x.T @ residual, alpha=-0.01)
        weight.add_(velocity)
        return {"loss": residual.square().mean()}

    result = fit(
        step, torch.randn(64, 4), epochs=75, batch_size=8,
        state={"weight": weight, "velocity": velocity},
        generator=torch.Generator().manual_seed(0),
        checkpoint=sys.argv[2] if len(sys.argv) > 2 else None, checkpoint_every=3,
    )
    state = {"weight": weight, "velocity": velocity, "history": result.history["loss"]}
    save_file(state, sys.argv[1])
    """
)


def killed_at_random_moments(tmp_path: Path, num_kills: int) -> None:
    def start(*arguments):
        command = [sys.executable, "-c", KILLED_RUN, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    reference = start(tmp_path / "expected")
    moments, steps, kills, attempts = random.Random(0), 0, 0, 0
    while kills < num_kills:
        attempts += 1
        assert attempts < 4 * num_kills, "the run ended before it could be killed"
        process = start(tmp_path / "result", tmp_path / "c")
        if process.stdout.readline() != "step\n":
            break
        time.sleep(moments.uniform(0.0, 1.0 / num_kills))
        process.kill()
        rest, _ = process.communicate()
        steps += 1 + rest.count("step")
        kills += process.returncode == -9
    assert kills == num_kills
    process = start(tmp_path / "result", tmp_path / "c")
    steps += process.communicate()[0].count("step")
    assert process.returncode == 0 and reference.communicate()[0].count("step") == 600
    # A kill loses the steps since the last checkpoint, and the one that was being written.
    assert 600 <= steps <= 600 + num_kills * 2 * 3
    expected, result = load_file(tmp_path / "expected"), load_file(tmp_path / "result")
    assert all(torch.equal(value, result[name]) for name, value in expected.items())


def test_killed_at_three_random_moments(tmp_path):
    killed_at_random_moments(tmp_path, num_kills=3)


@pytest.mark.soak
def test_killed_at_twenty_random_moments(tmp_path):
    killed_at_random_moments(tmp_path, num_kills=20)


# --- bad states of a checkpoint ------------------------------------------------------------------


def partial_run(checkpoint, interrupt_at=9):
    run = Run()
    run.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        run.fit(checkpoint=checkpoint, checkpoint_every=3)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[-20] ^= 1
    elif how == "flipped bit in the header":
        content[content.index(b"batch_size")] ^= 1
    else:
        content = content[: {"empty": 0, "header only": 200, "last byte missing": -1}[how]]
    path.write_bytes(content)


HOW = ["empty", "header only", "last byte missing", "flipped bit", "flipped bit in the header"]


@pytest.mark.parametrize("how", HOW)
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted, how):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    damage(checkpoint, how)
    run = Run()
    with pytest.warns(UserWarning, match=r"c is damaged.*going on from the checkpoint before it"):
        result = run.fit(checkpoint=checkpoint, checkpoint_every=3)
    assert run.num_calls == 15 - 3
    assert_same(run, uninterrupted[0], result, uninterrupted[1])


def assert_any_damage_is_noticed(path: Path) -> None:
    """A bit is flipped anywhere, and half the time the file is cut, too."""
    good, dice = path.read_bytes(), random.Random(0)
    for _ in range(300):
        content = bytearray(good)
        content[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        path.write_bytes(content[: dice.choice([None, dice.randrange(len(good))])])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_any_damage_is_noticed(tmp_path):
    write_checkpoint(tmp_path / "c", {"state": torch.arange(9.0), "done": 3})
    assert_any_damage_is_noticed(tmp_path / "c")


def test_damaged_checkpoint_does_not_push_out_the_one_before(tmp_path, uninterrupted):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    damage(checkpoint, "flipped bit")
    run = Run()
    run.interrupt_at = 1
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(KeyboardInterrupt):
        run.fit(checkpoint=checkpoint, checkpoint_every=3)
    run = Run()
    assert_same(run, uninterrupted[0], run.fit(checkpoint=checkpoint), uninterrupted[1])
    assert run.num_calls == 12


def test_killed_between_keeping_the_old_and_naming_the_new(tmp_path, uninterrupted):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    os.replace(checkpoint, tmp_path / "c.previous")
    run = Run()
    with pytest.warns(UserWarning, match="c is missing; going on from the checkpoint before it"):
        result = run.fit(checkpoint=checkpoint)
    assert_same(run, uninterrupted[0], result, uninterrupted[1])


def test_no_readable_checkpoint_is_an_error(tmp_path):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    damage(checkpoint, "empty")
    damage(tmp_path / "c.previous", "flipped bit")
    with pytest.raises(CheckpointError, match=r"c is damaged.*c.previous is damaged.*remove both"):
        Run().fit(checkpoint=checkpoint)
    (tmp_path / "c.previous").unlink()
    with pytest.raises(CheckpointError, match=r"c is damaged.*remove it to start afresh"):
        Run().fit(checkpoint=checkpoint)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_checkpoint_intact(tmp_path, uninterrupted, monkeypatch, call):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    kept = checkpoint.read_bytes()

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(training.os, call, no_space)
        with pytest.raises(OSError, match=r"cannot write the checkpoint.*No space left") as caught:
            Run().fit(checkpoint=checkpoint)
        assert caught.value.errno == errno.ENOSPC
    assert checkpoint.read_bytes() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.previous"]
    run = Run()
    assert_same(run, uninterrupted[0], run.fit(checkpoint=checkpoint), uninterrupted[1])


@pytest.fixture
def small_files(monkeypatch):
    """Checkpoints of these runs in several parts."""
    monkeypatch.setattr(training, "MAX_FILE_BYTES", 2000)


def parts_of(checkpoint: Path) -> set[str]:
    return set(json.loads(checkpoint.read_bytes())["parts"])


def test_large_checkpoint_lies_in_parts_that_can_be_carried_away(
    tmp_path, uninterrupted, small_files
):
    here, there = tmp_path / "here", tmp_path / "there"
    partial_run(here / "c")
    parts = parts_of(here / "c") | parts_of(here / "c.previous")
    assert len(parts) > 4
    assert {p.name for p in here.iterdir()} == parts | {"c", "c.previous"}  # and no older ones
    assert all(p.stat().st_size <= 2000 for p in here.iterdir())
    shutil.copytree(here, there)
    run = Run()
    assert_same(run, uninterrupted[0], run.fit(checkpoint=there / "c"), uninterrupted[1])


@pytest.mark.parametrize("how", ["missing", "flipped bit", "last byte missing"])
def test_damaged_part_falls_back_to_the_checkpoint_before(
    tmp_path, uninterrupted, small_files, how
):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    part = tmp_path / min(parts_of(checkpoint))
    part.unlink() if how == "missing" else damage(part, how)
    run = Run()
    with pytest.warns(UserWarning, match=r"c is damaged.*going on from the checkpoint before it"):
        result = run.fit(checkpoint=checkpoint, checkpoint_every=3)
    assert run.num_calls == 15 - 3
    assert_same(run, uninterrupted[0], result, uninterrupted[1])
    assert {p.name for p in tmp_path.iterdir()} == parts_of(checkpoint) | parts_of(
        tmp_path / "c.previous"
    ) | {"c", "c.previous"}


def test_any_damage_to_a_list_of_parts_is_noticed(tmp_path, small_files):
    write_checkpoint(tmp_path / "c", {"state": torch.arange(900.0), "done": 3})
    assert_any_damage_is_noticed(tmp_path / "c")
    write_checkpoint(tmp_path / "c", {"done": 4})  # whole again; what is left goes
    assert {p.name for p in tmp_path.iterdir()} == {"c", "c.previous"}


def test_equal_checkpoints_do_not_overwrite_each_other(tmp_path, small_files, monkeypatch):
    tree = {"state": torch.arange(900.0), "done": 3}
    write_checkpoint(tmp_path / "c", tree)

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(training.os, "fsync", no_space)
        with pytest.raises(OSError, match="the one before it is intact"):
            write_checkpoint(tmp_path / "c", tree)
    assert torch.equal(read_checkpoint(tmp_path / "c")["state"], tree["state"])


@pytest.mark.parametrize("room", range(4))
def test_disk_that_fills_up_between_parts(tmp_path, uninterrupted, small_files, monkeypatch, room):
    checkpoint = tmp_path / "c"
    partial_run(checkpoint)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fsync, calls = os.fsync, itertools.count()

    def no_space(descriptor):
        if next(calls) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(training.os, "fsync", no_space)
        with pytest.raises(OSError, match=r"cannot write the checkpoint.*No space left"):
            Run().fit(checkpoint=checkpoint)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    run = Run()
    assert_same(run, uninterrupted[0], run.fit(checkpoint=checkpoint), uninterrupted[1])


def test_full_file_system(tmp_path):
    """The same with a device that is truly full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    os.symlink("/dev/full", tmp_path / "c.tmp")
    with pytest.raises(OSError, match=r"cannot write the checkpoint.*No space left"):
        Run().fit(checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_second_run_of_a_checkpoint_is_refused(tmp_path):
    run = Run()

    def step(*batch):
        with pytest.raises(CheckpointLockedError, match=f"in use by process {os.getpid()} on "):
            Run().fit(checkpoint=tmp_path / "c")
        return run.step(*batch)

    fit(
        step,
        run.data,
        epochs=1,
        batch_size=11,
        state=run.state,
        generator=run.generator,
        checkpoint=tmp_path / "c",
    )
    assert run.num_calls == 2


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "c.lock").write_text(f"process {ended.pid} on this machine\n")
    assert Run().fit(checkpoint=tmp_path / "c").finished
    assert not (tmp_path / "c.lock").exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"batch_size": 5}, "batch_size: 4 in the checkpoint, 5 now"),
        ({}, {"drop_last": False}, "drop_last: True in the checkpoint, False now"),
        ({}, {"config": {"rule": "b", "K": 2}}, "config.rule: 'a' in the checkpoint, 'b' now"),
        ({}, {"config": None}, "config.rule: 'a' in the checkpoint, absent now"),
        ({"width": 7}, {}, r"net.0.weight: float32\[6, 4\] in the checkpoint, float32\[7, 4\] now"),
        ({"lr": 0.1}, {}, r"optimizer.param_groups.0.initial_lr: 0.02 in the checkpoint, 0.1 now"),
        ({"num_steps": 99}, {}, r"scheduler.lr_lambdas.0.num_steps: 15 in the checkpoint, 99 now"),
        ({"decay": False}, {}, r"scheduler.base_lrs.0: 0.02 in the checkpoint, absent now"),
        ({}, {"epochs": 1}, "steps: 9 done already, 5 asked for now"),
    ],
)
def test_checkpoint_of_another_run_is_refused_naming_what_differs(
    tmp_path, change, options, message
):
    config = {"config": {"rule": "a", "K": 2}}
    run = Run()
    run.interrupt_at = 10
    with pytest.raises(KeyboardInterrupt):
        run.fit(checkpoint=tmp_path / "c", checkpoint_every=3, **config)
    kept = (tmp_path / "c").read_bytes()
    other = Run(**change)
    with pytest.raises(CheckpointError, match=message) as caught:
        other.fit(checkpoint=tmp_path / "c", **(config | options))
    assert other.num_calls == 0 and (tmp_path / "c").read_bytes() == kept
    assert "different run" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_and_overwrites_nothing(tmp_path, value):
    checkpoint, run = tmp_path / "c", Run()
    good = run._step

    def step(*batch):
        losses = good(*batch)
        run.num_calls += 1
        return losses | {"noise": torch.tensor(value)} if run.num_calls == 9 else losses

    run._step = step
    run.step = step
    with pytest.raises(NonFiniteError) as caught:
        run.fit(checkpoint=checkpoint, checkpoint_every=3)
    error = caught.value
    assert isinstance(error, FloatingPointError)
    assert error.step == 9 and error.checkpoint == checkpoint
    assert str(error) == f"step 9: loss 'noise' is {value} (last good checkpoint: {checkpoint})"
    assert read_checkpoint(checkpoint)["done"] == 6
    with pytest.raises(NonFiniteError, match=r"step 9: .*\(there is no checkpoint yet\)"):
        run.num_calls = 0
        run.generator.manual_seed(0)
        run.fit()


def test_losses_that_wait_on_a_device_are_traced_to_their_step(monkeypatch):
    record = training._LossRecord(100)
    # What an accelerator does, played through on the CPU: rows wait until they are asked for.
    monkeypatch.setattr(
        record, "add", lambda losses, last: record.pending.append(record._row(losses))
    )
    for t in range(40):
        record.add({"a": torch.tensor(1.0), "b": torch.tensor(math.nan if t == 30 else 1.0)}, None)
        if t == 19:
            record.flush(None)
            assert record.num_rows == 20
    with pytest.raises(NonFiniteError, match="step 31: loss 'b' is nan"):
        record.flush(None)


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_non_finite_parameters_are_not_saved_though_all_losses_were_finite(
    tmp_path, use_checkpoint
):
    run = Run()
    good = run.step

    def step(*batch):
        losses = good(*batch)
        if run.num_calls == 15:
            with torch.no_grad():
                run.net[2].bias.fill_(math.nan)
        return losses

    run.step = step
    checkpoint = tmp_path / "c" if use_checkpoint else None
    with pytest.raises(NonFiniteError, match=r"step 15: tensor net.2.bias of the state"):
        run.fit(checkpoint=checkpoint)
    if use_checkpoint:
        assert read_checkpoint(checkpoint)["done"] == 10


# --- the file ------------------------------------------------------------------------------------


def test_tree_comes_back_as_it_was(tmp_path):
    tree = {
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "odd": [math.inf, -0.0, 10**20, "ψ.0", True, (), []],
        "types": [torch.ones(2, dtype=t) for t in (torch.bfloat16, torch.bool, torch.int64)],
        "empty": torch.zeros(0, 3),
        "view": torch.arange(12.0).reshape(3, 4).T,
        "shared": [shared := torch.ones(2), shared],
    }
    write_checkpoint(tmp_path / "c", tree)
    back = read_checkpoint(tmp_path / "c")
    assert back["groups"] == tree["groups"] and back["odd"] == tree["odd"]
    assert isinstance(back["groups"][0]["betas"], tuple) and list(back["state"]) == [0, 1]
    for name in ("types", "shared"):
        for ours, theirs in zip(tree[name], back[name], strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(back["view"], tree["view"])
    assert back["view"].stride() == tree["view"].stride()
    assert back["empty"].shape == (0, 3)
    assert back["state"][0]["step"].shape == ()


def test_only_plain_values_are_written_and_no_pickle_is_read(tmp_path):
    with pytest.raises(TypeError, match=r"state\.rule is a function"):
        write_checkpoint(tmp_path / "c", {"state": {"rule": lambda: 0}})
    with pytest.raises(TypeError, match="keys"):
        write_checkpoint(tmp_path / "c", {"state": {(1, 2): 0}})
    assert list(tmp_path.iterdir()) == []
    torch.save({"done": 3}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "c")
    assert read_checkpoint(tmp_path / "none") is None


def test_other_files_and_formats_are_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weights is damaged, or no checkpoint"):
        Run().fit(checkpoint=tmp_path / "weights")
    assert load_file(tmp_path / "weights")["weight"].tolist() == [1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(training, "_FORMAT", "0")
        write_checkpoint(tmp_path / "c", {"done": 3})
    with pytest.raises(CheckpointError, match="c has format 0, this is format 1"):
        read_checkpoint(tmp_path / "c")
