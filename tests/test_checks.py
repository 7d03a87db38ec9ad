"""Parameters are refused before any work; answers are judged as the messages say."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from amortised import checks

# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specification", "good", "bad"),
    [
        (checks.integer(), [-3, 0, 10**12, np.int64(3)], [1.0, "1", True, None, math.nan]),
        (checks.integer(minimum=1, maximum=3), [1, 2, 3], [0, 4, -1, False]),
        (
            checks.real(),
            [1, -2.5, np.float32(0.5), 10**400],
            ["1", True, None, math.nan, math.inf, 1j],
        ),
        (checks.real(minimum=0), [0, 0.0, 1e9], [-1e-9, -1]),
        (checks.real(minimum=0, open=True), [1e-300, 5], [0, 0.0, -1]),
        (checks.real(minimum=0, maximum=1), [0, 0.5, 1], [1.1, -0.1]),
        (checks.real(minimum=0, maximum=1, open=True), [0.5], [0, 1]),
        (checks.real(minimum=0, maximum=1, open="maximum"), [0, 0.5], [1, 1.0]),
        (checks.real(minimum=0, maximum=1, open="minimum"), [0.5, 1], [0]),
        (checks.boolean(), [True, False], [0, 1, "true", None]),
        (checks.choice("a", "b"), ["a", "b"], ["c", "A", "", None, 1]),
        (checks.choice(1, None), [1, None], [True, 1.0, "None"]),
        (checks.device(), ["cpu"], ["gpu0", "CPU", "cpu:x", "cuda:99", 0, None, ""]),
    ],
)
def test_specifications(specification, good, bad):
    for value in good:
        assert checks.parameters({"name": value}, name=specification) is None
    for value in bad:
        with pytest.raises(ValueError, match=r"^parameter name = .*: must be ") as caught:
            checks.parameters({"name": value}, name=specification)
        assert f"name = {value!r}: " in str(caught.value)


YAML = "this is text: in YAML write a decimal point, as in 1.0e-3"


@pytest.mark.parametrize(
    ("specification", "value", "expected"),
    [
        (checks.integer(), "x", "an integer"),
        (checks.integer(maximum=5), 6, "an integer, at most 5"),
        (checks.integer(1, 5), 6, "an integer, at least 1 and at most 5"),
        (checks.real(0, 1), 2, "a number, at least 0 and at most 1"),
        (checks.real(0, 1, open=True), 2, "a number greater than 0 and less than 1"),
        (checks.real(maximum=1, open=True), 2, "a number less than 1"),
        (checks.choice("a", 2), 1, "one of 'a', 2"),
        (checks.boolean(), 1, "True or False"),
        (checks.real(0), "1e-3", f"a number, at least 0; {YAML}"),
    ],
)
def test_messages_state_the_valid_range(specification, value, expected):
    assert specification(value) == expected


def test_devices_of_this_machine_are_listed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert checks.device()(name) is None
    expected = "a device of this machine: 'cpu', 'cuda', 'cuda:0', 'cuda:1'"
    assert checks.device()("cuda:2") == checks.device()("mps") == expected


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as caught:
        checks.parameters(
            {"epochs": -1, "rule": "c"},
            epochs=checks.integer(minimum=1),
            rule=checks.choice("a", "b"),
            seed=checks.integer(),
        )
    assert str(caught.value).splitlines() == [
        "parameter epochs = -1: must be an integer, at least 1",
        "parameter rule = 'c': must be one of 'a', 'b'",
        "parameter seed: not defined. Run the parameters cell first",
    ]


CHECK = "checks.parameters(globals(), epochs=checks.integer(minimum=1), seed=checks.integer())"


@pytest.fixture
def run():
    """Cells run one after another as a Jupyter kernel runs them."""
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config, user_ns={"checks": checks})

    def run(*cells, store_history=True):
        for cell in cells:
            result = shell.run_cell(cell, store_history=store_history)
        return result.error_in_exec

    yield run
    shell.restore_sys_module_state()


DEFAULTS = "epochs: int = 2  # passes\nseed: int = 0"


def test_injected_cell(run, capsys):
    assert run(DEFAULTS, "# Parameters\nepochs = 5\n", CHECK) is None
    assert capsys.readouterr() == ("", "")
    error = run(DEFAULTS, "# Parameters\nepoch = 20\nseed = 1\nname: str = 'x'\n", CHECK)
    assert isinstance(error, ValueError)
    assert str(error).splitlines() == [
        "parameter epoch: set in the cell '# Parameters', but unknown. Did you mean epochs?",
        "parameter name: set in the cell '# Parameters', but unknown. "
        "This chapter knows epochs, seed",
    ]
    # Mended and run again out of order: the latest injected cell counts.
    assert run("# Parameters\nepochs = 20\n", CHECK) is None
    assert "epochs = 0" in str(run("# Parameters\nepochs = 0\n", CHECK))
    assert (
        run(DEFAULTS, "epoch = 3  # a variable of the reader's own", "# Parameters", CHECK) is None
    )


def test_cells_that_leave_no_history(run):
    """As nbval runs them."""
    assert run(DEFAULTS, CHECK, store_history=False) is None
    assert "epochs = -1" in str(run("epochs = -1", CHECK, store_history=False))


def test_plain_script():
    namespace = {"checks": checks}
    exec(f"{DEFAULTS}\n{CHECK}", namespace)
    with pytest.raises(ValueError, match=r"parameter seed = 1\.5"):
        exec(f"seed = 1.5\n{CHECK}", namespace)


# --- answers -------------------------------------------------------------------------------------


def refused(message, check, *arguments, error=AssertionError, **options):
    with pytest.raises(error, match=message):
        check(*arguments, **options)


def test_close(capsys):
    checks.close(torch.tensor([1.0, 2.0]), [1.0, 2.00001], rtol=1e-4, label="the bound")
    assert capsys.readouterr().out == "✓ the bound is as expected\n"
    checks.close(1.0, 1.4, atol=0.5)
    checks.close(np.float64(1.0), torch.tensor(1.0, requires_grad=True))
    message = r"✗ the bound is 2 at flat index 1, expected 3\.\nHint: mind the sign"
    options = {"label": "the bound", "hint": "mind the sign"}
    refused(message, checks.close, [1.0, 2.0], [1.0, 3.0], **options)
    refused(r"has shape \[2, 1\], not \[2\]", checks.close, torch.zeros(2, 1), torch.zeros(2))
    for value in (math.nan, math.inf):
        refused(f"is {value} at flat index 1", checks.close, [1.0, value], [1.0, 1.0], atol=1e9)


def test_within_error(capsys):
    checks.within_error(1.03, 1.0, 0.01, label="the mean")
    assert capsys.readouterr().out == "✓ the mean is within 4 standard errors of the truth\n"
    checks.within_error(torch.tensor(1.05), 1.0, 0.01, num_standard_errors=6)
    message = r"is 1.05, 5.0 standard errors off \(at most 4 allowed\); truth 1"
    refused(message, checks.within_error, 1.05, 1.0, 0.01)
    refused("nan", checks.within_error, math.nan, 1.0, 0.1)
    for standard_error in (0.0, -1.0, math.nan):
        refused("must be positive", checks.within_error, 1.0, 1.0, standard_error)


def test_ordered_wants_the_first_number_smaller():
    checks.ordered(1.0, torch.tensor(2.0))
    for a, b in ((2.0, 1.0), (1.0, 1.0), (math.nan, 1.0)):
        refused("is not smaller than", checks.ordered, a, b)


def test_log_density_normalised(capsys):
    normal = torch.distributions.Normal(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.5]))

    def log_density(z, shift=0.0):
        return normal.log_prob(z).sum(-1) + shift

    normalised = checks.log_density_normalised
    normalised(log_density, -9, 9, dim=2, label="the Gaussian")
    assert capsys.readouterr().out == "✓ the Gaussian integrates to one\n"
    message = r"the density integrates to 1\.1\d* over the box"
    refused(message, normalised, partial(log_density, shift=0.1), -9, 9, dim=2)
    refused("integrates to nan", normalised, lambda z: z.sum(-1) * math.nan, -1, 1)


def test_mistakes_in_a_check_are_errors():
    refused("open must be", checks.real, open="both", error=ValueError)
    refused("at least one name", checks.choice, error=ValueError)
    problem = (checks.log_density_normalised, torch.sum, -1, 1)
    refused("dim must be 1 or 2, got 3", *problem, dim=3, error=ValueError)


def test_graded_copies_do_not_tell_the_answer(monkeypatch):
    def messages():
        for check in (
            lambda: checks.close(1.5, 2.25, hint="look"),
            lambda: checks.within_error(1.5, 2.25, 0.1, hint="look"),
            lambda: checks.ordered(2.25, 1.5, hint="look"),
        ):
            with pytest.raises(AssertionError, match="Hint: look") as failure:
                check()
            yield str(failure.value)

    assert all("2.25" in message for message in messages())
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert not any("2.25" in message for message in messages())
