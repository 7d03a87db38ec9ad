r"""Checks that chapters and exercises call: parameters before any work, answers after it.

:func:`parameters` is the second code cell of every chapter. It looks at the values that the
parameters cell and papermill left behind and stops, before anything is computed, when one of them
cannot be used. The other functions mark a reader's answer to an exercise: they print one line that
starts with a tick, or raise an ``AssertionError`` that says by how much the answer misses and, if
the exercise gives one, a hint. Where ``NBGRADER_EXECUTION`` is set, as in graded coursework, the
message keeps to itself what the answer should have been.
"""

import ast
import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# A check of one value: returns what the value must be when it is not, and None when it is.
Specification = Callable[[object], str | None]


# --- chapter parameters --------------------------------------------------------------------------


def parameters(namespace: Mapping[str, object], **specifications: Specification) -> None:
    r"""Check a chapter's parameters before any work is done.

    Every name in ``specifications`` must be defined in ``namespace`` and pass its check. Under
    papermill the chapter also contains an injected cell whose first line is ``# Parameters``; a
    name that this cell sets and the chapter does not know is refused, so that a mistyped
    ``-p epoch 20`` cannot run a whole chapter with the default it was meant to replace. The cell
    is found in IPython's input history, so the check also works in a plain script, where there is
    no such cell, and when cells are run again out of order, where the latest one counts.

    :param namespace: the chapter's variables, ``globals()``.
    :param specifications: one check for each parameter, made by :func:`integer`, :func:`real`,
        :func:`boolean`, :func:`choice` or :func:`device`.
    :raises ValueError: with one line for each bad parameter: its name, its value, and the valid
        range or names.

    >>> epochs, rule = 3, "forward"
    >>> parameters(globals(), epochs=integer(minimum=1), rule=choice("forward", "reverse"))
    >>> parameters({"epochs": -1}, epochs=integer(minimum=1))
    Traceback (most recent call last):
        ...
    ValueError: parameter epochs = -1: must be an integer, at least 1
    >>> injected = {"In": ["# Parameters\nepoch = 20"], "epochs": 3}
    >>> parameters(injected, epochs=integer(minimum=1))
    Traceback (most recent call last):
        ...
    ValueError: parameter epoch: set in the cell '# Parameters', but unknown. Did you mean epochs?
    """
    problems = [
        f"parameter {name}: set in the cell '# Parameters', but unknown. "
        + _suggestion(name, specifications)
        for name in _injected_names(namespace)
        if name not in specifications
    ]
    for name, specification in specifications.items():
        if name not in namespace:
            problems.append(f"parameter {name}: not defined. Run the parameters cell first")
            continue
        expected = specification(namespace[name])
        if expected is not None:
            problems.append(f"parameter {name} = {namespace[name]!r}: must be {expected}")
    if problems:
        raise ValueError("\n".join(problems))


def integer(minimum: int | None = None, maximum: int | None = None) -> Specification:
    """A whole number between ``minimum`` and ``maximum``, both included. ``True`` is not one.

    >>> integer(minimum=1)(2.0)
    'an integer, at least 1'
    """
    return _number(numbers.Integral, "an integer", minimum, maximum)


def real(
    minimum: float | None = None, maximum: float | None = None, open: bool | str = False
) -> Specification:
    """A finite number between ``minimum`` and ``maximum``.

    :param open: ``True`` excludes both ends of the range, ``"minimum"`` or ``"maximum"`` only the
        one it names.

    >>> real(minimum=0, open=True)(0.0)
    'a number greater than 0'
    >>> real(minimum=0, maximum=1, open="maximum")(1)
    'a number, at least 0 and less than 1'
    """
    if open not in (True, False, "minimum", "maximum"):
        raise ValueError(f"open must be True, False, 'minimum' or 'maximum', got {open!r}")
    above, below = open in (True, "minimum"), open in (True, "maximum")
    is_number = _number(numbers.Real, "a number", minimum, maximum, above, below)

    def check(value: object) -> str | None:
        expected = is_number(value)
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            # YAML 1.1 reads 1e-3 as text; only 1.0e-3 is a number there.
            expected += "; this is text: in YAML write a decimal point, as in 1.0e-3"
        return expected

    return check


def boolean() -> Specification:
    """``True`` or ``False``; neither 0 and 1 nor a word for them.

    >>> boolean()(1)
    'True or False'
    """
    return lambda value: None if isinstance(value, bool) else "True or False"


def choice(*names: object) -> Specification:
    """One of ``names``.

    >>> choice("forward", "reverse")("backward")
    "one of 'forward', 'reverse'"
    """
    if not names:
        raise ValueError("choice() needs at least one name to choose from")
    expected = "one of " + ", ".join(map(repr, names))

    def check(value: object) -> str | None:
        return None if any(type(value) is type(n) and value == n for n in names) else expected

    return check


def device() -> Specification:
    """The name of a device that PyTorch can use on this machine: cpu, cuda, cuda:N or mps.

    >>> device()("gpu0").startswith("a device of this machine: 'cpu'")
    True
    """

    def check(value: object) -> str | None:
        present = ["cpu"]
        if torch.cuda.is_available():
            present += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            present.append("mps")
        if isinstance(value, str) and value in present:
            return None
        return "a device of this machine: " + ", ".join(map(repr, present))

    return check


def _number(kind: type, name: str, minimum, maximum, above=False, below=False) -> Specification:
    """A finite number of one kind in a range; ``above`` and ``below`` leave out its ends."""
    lower = "" if minimum is None else f"{'greater than' if above else 'at least'} {minimum}"
    upper = "" if maximum is None else f"{'less than' if below else 'at most'} {maximum}"
    text = " and ".join(filter(None, (lower, upper)))
    expected = name + (", " if text.startswith("at") else " " if text else "") + text
    low = -math.inf if minimum is None else minimum
    high = math.inf if maximum is None else maximum

    def check(value: object) -> str | None:
        if not isinstance(value, kind) or isinstance(value, bool) or abs(value) == math.inf:
            return expected
        large_enough = value > low if above else value >= low
        small_enough = value < high if below else value <= high
        return None if large_enough and small_enough else expected

    return check


def _injected_names(namespace: Mapping[str, object]) -> list[str]:
    """Names that the latest cell starting with ``# Parameters`` assigns, in its order."""
    history = namespace.get("In")
    for source in reversed(history if isinstance(history, list) else []):
        if source.strip().partition("\n")[0].strip() == "# Parameters":
            names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            return [name.id for name in names if isinstance(name.ctx, ast.Store)]
    return []


def _suggestion(name: str, known: Mapping[str, object]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {similar[0]}?" if similar else "This chapter knows " + ", ".join(known)


# --- answers to exercises ------------------------------------------------------------------------


def close(
    actual: object,
    expected: object,
    *,
    atol: float = 0.0,
    rtol: float = 1e-5,
    label: str = "the answer",
    hint: str = "",
) -> None:
    r"""Check that :math:`|a - e| \le \text{atol} + \text{rtol}\,|e|` for all elements.

    :param actual: the answer, a number or an array of any shape.
    :param expected: what it should be, of the same shape.
    :param label: what the answer is, for the message.
    :param hint: what to look at first when the check fails.
    :raises AssertionError: if shapes differ or an element is too far away or not finite.

    >>> close(0.1 + 0.2, 0.3, label="the sum")
    ✓ the sum is as expected
    """
    actual, expected = _as_tensor(actual), _as_tensor(expected)
    if actual.shape != expected.shape:
        _fail(f"{label} has shape {list(actual.shape)}, not {list(expected.shape)}", hint)
    error = (actual - expected).abs()
    excess = error - (atol + rtol * expected.abs())
    # A comparison with nan is False, so this also catches nan.
    if not bool((excess <= 0).all()):
        worst = int(torch.nan_to_num(excess, nan=math.inf).argmax())
        a, e = (float(t.reshape(-1)[worst]) for t in (actual, expected))
        where = f" at flat index {worst}" if actual.numel() > 1 else ""
        _fail(f"{label} is {a:.6g}{where}", hint, f", expected {e:.6g}")
    print(f"✓ {label} is as expected")


def within_error(
    estimate: float,
    truth: float,
    standard_error: float,
    num_standard_errors: float = 4.0,
    *,
    label: str = "the estimate",
    hint: str = "",
) -> None:
    """Check that a Monte Carlo estimate is within a few standard errors of the truth.

    At four standard errors a right answer fails once in about 16,000 times.

    :param estimate: the estimate.
    :param truth: the exact value.
    :param standard_error: standard error of the estimate, greater than 0.
    :raises AssertionError: if the estimate is too far away or not finite.

    >>> within_error(1.02, 1.0, standard_error=0.01, label="the variance")
    ✓ the variance is within 4 standard errors of the truth
    """
    estimate, truth, standard_error = float(estimate), float(truth), float(standard_error)
    if not standard_error > 0:
        _fail(f"the standard error of {label} is {standard_error:.6g}, it must be positive", hint)
    distance = abs(estimate - truth) / standard_error
    if not distance <= num_standard_errors:
        found = f"{label} is {estimate:.6g}, {distance:.1f} standard errors off"
        _fail(f"{found} (at most {num_standard_errors:g} allowed)", hint, f"; truth {truth:.6g}")
    print(f"✓ {label} is within {num_standard_errors:g} standard errors of the truth")


def ordered(smaller: float, larger: float, *, label: str = "the order", hint: str = "") -> None:
    """Check that one number is smaller than another.

    :raises AssertionError: if it is not, or one of them is not a number.

    >>> ordered(0.3, 0.5, label="the order of the two scales")
    ✓ the order of the two scales is as expected
    """
    smaller, larger = float(smaller), float(larger)
    if not smaller < larger:
        _fail(f"{label} is wrong", hint, f": {smaller:.6g} is not smaller than {larger:.6g}")
    print(f"✓ {label} is as expected")


def log_density_normalised(
    log_density_fn: Callable[[Tensor], Tensor],
    lower: float,
    upper: float,
    *,
    dim: int = 1,
    num_points: int = 801,
    atol: float = 1e-3,
    label: str = "the density",
    hint: str = "",
) -> None:
    r"""Check that :math:`\int \exp\{\log p(z)\}\,dz = 1` over a box, by the trapezoidal rule.

    The rule is accurate far below the default tolerance for a smooth density that has died out at
    the edges of the box.

    :param log_density_fn: maps ``[..., dim]`` to ``[...]``, in nats.
    :param lower: lower edge of the box, the same in each dimension.
    :param upper: upper edge of the box.
    :param dim: 1 or 2.
    :param num_points: grid points in each dimension.
    :raises AssertionError: if the integral is not 1.

    >>> log_density_normalised(lambda z: -0.5 * z[..., 0] ** 2 - 0.5 * math.log(math.tau), -8, 8)
    ✓ the density integrates to one
    """
    if dim not in (1, 2):
        raise ValueError(f"dim must be 1 or 2, got {dim}")
    axis = torch.linspace(lower, upper, num_points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[axis] * dim, indexing="ij"), dim=-1)
    integral = log_density_fn(grid).double().exp()
    for _ in range(dim):
        integral = torch.trapezoid(integral, axis, dim=-1)
    if not abs(float(integral) - 1.0) <= atol:
        _fail(f"{label} integrates to {float(integral):.6g} over the box, not to 1", hint)
    print(f"✓ {label} integrates to one")


def _as_tensor(value: object) -> Tensor:
    return torch.as_tensor(value).detach().cpu().double()


def _fail(message: str, hint: str, answer: str = "") -> None:
    told = "" if os.environ.get("NBGRADER_EXECUTION") else answer
    raise AssertionError(f"✗ {message}{told}." + (f"\nHint: {hint}" if hint else ""))
