"""Build the site from the executed chapters: python workflow/site.py

Sphinx is nitpicky and its warnings are errors. The site is built from nothing in .cache/site and
moves to book/_build/html when it is complete, so that no page of an earlier build lingers and no
half-made page is ever seen there.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from locked import hold

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / ".cache" / "site"
SITE = ROOT / "book" / "_build" / "html"
WARNING = re.compile(r"WARNING|ERROR|[Ee]xception|Error:")


def build(lock) -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    options = ["-n", "-W", "--keep-going", "--path-output", str(SCRATCH)]
    done = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", "book", *options],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=[lock.fileno()],
    )
    log = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    (SCRATCH / "log.txt").write_text(log, encoding="utf-8")
    if done.returncode:
        found = [line for line in log.splitlines() if WARNING.search(line)]
        sys.exit(
            "\n".join(["The site was not built:", *found, f"The whole log: {SCRATCH}/log.txt"])
        )
    if SITE.exists():
        os.rename(SITE, SCRATCH / "previous")
    SITE.parent.mkdir(parents=True, exist_ok=True)
    os.rename(SCRATCH / "_build" / "html", SITE)


if __name__ == "__main__":
    started = time.monotonic()
    with hold(ROOT / ".cache" / "locks" / "site", "building the site") as lock:
        build(lock)
    print(f"{'site':<24} built in    {time.monotonic() - started:5.1f} s", flush=True)
