"""Make .venv with the pinned packages; do nothing when it is there.

Run with the Python that .venv shall have, standard library only. The steps follow the pins:
everything but torch by hash, torch by version (what it needs is there by then, but for the parts of
its own that differ by platform), then this project's own package in place. A stamp with the
digest of what was asked for is written last. An installation that was cut short is begun again from
an empty folder; a renewed lock is installed over the old one.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from locked import hold

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
BEGUN = VENV / "installation-begun"
LAB, LAB_STAMP = ROOT / "requirements-lab.lock", VENV / "installed-lab"
PINS = ["requirements.in", "requirements.lock", "pyproject.toml", "workflow/environment.py"]


def state() -> str:
    """Which folder and Python .venv belongs to, and the digest of what is asked for."""
    contents = b"\0".join((ROOT / name).read_bytes() for name in PINS)
    return f"{ROOT}\n{PYTHON.resolve()}\n{hashlib.sha256(contents).hexdigest()}\n"


def is_complete() -> bool:
    return STAMP.exists() and PYTHON.exists() and STAMP.read_text(encoding="utf-8") == state()


def is_broken() -> bool:
    """Cut short, copied from elsewhere, or its Python has gone."""
    if not STAMP.exists():
        return BEGUN.exists()
    return (
        not PYTHON.exists()
        or STAMP.read_text(encoding="utf-8").split("\n")[:2] != state().split("\n")[:2]
    )


def torch_pin() -> str:
    text = (ROOT / "requirements.in").read_text(encoding="utf-8")
    return re.search(r"^torch==\S+", text, re.MULTILINE)[0]


def step(name: str, *command: str) -> None:
    """Run one step, showing one line; show what it printed only if it fails."""
    started = time.monotonic()
    print(f"{name:<24} ", end="", flush=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PIP_USER": "0"},  # or pip would install beside .venv, not in it
        pass_fds=[LOCK.fileno()],  # held while pip lives, even if this process is killed
    )
    if done.returncode:
        sys.exit(f"failed\n{done.stdout}\nThe step that failed: {' '.join(command)}")
    print(f"installed in {time.monotonic() - started:4.1f} s", flush=True)


def pip(name: str, *arguments: str) -> None:
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-warn-script-location"]
    step(name, str(PYTHON), "-m", "pip", "install", *options, *arguments)


def install() -> None:
    if is_broken():
        VENV.rename(f"{VENV}-stale-{os.getpid()}")
    for stale in ROOT.glob(".venv-stale-*"):
        shutil.rmtree(stale, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    BEGUN.touch()
    STAMP.unlink(missing_ok=True)
    step(f"Python {sys.version.split()[0]}", sys.executable, "-m", "venv", str(VENV))
    pip("pinned packages", "--require-hashes", "--no-deps", "-r", "requirements.lock")
    pip(torch_pin(), torch_pin())
    pip("the library", "--no-deps", "--no-build-isolation", "--editable", ".")


def lab_state() -> str:
    return state() + hashlib.sha256(LAB.read_bytes()).hexdigest() + "\n"


def lab_is_complete() -> bool:
    return LAB_STAMP.exists() and LAB_STAMP.read_text(encoding="utf-8") == lab_state()


if __name__ == "__main__":
    lab = "lab" in sys.argv[1:]
    if not is_complete() or (lab and not lab_is_complete()):
        LOCK = hold(ROOT / ".cache" / "environment.lock", "installing packages")
        if not is_complete():
            install()
            STAMP.write_text(state(), encoding="utf-8")
        if lab and not lab_is_complete():
            pip("JupyterLab, nbgrader", "--require-hashes", "--no-deps", "-r", LAB.name)
            LAB_STAMP.write_text(lab_state(), encoding="utf-8")
