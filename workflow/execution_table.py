"""Print the table of execution times and versions: execution_table.py TIMING.json ...

The page book/reproducing.md includes it; links are relative to that page's folder. With --record
the times become those of workflow/times.json, and README and the heads of the chapters follow them.
"""

import json
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = ROOT / "workflow" / "times.json"
PACKAGES = ["torch", "numpy", "papermill", "jupyter-book"]
HALF_MINUTES = ["a few seconds", "half a minute", "a minute", "a minute and a half", "two minutes"]
HEAD = re.compile(r"(?<=bout )[a-z ]+? (?=on one core)")
README_ROW = re.compile(r"(?<=`make book` \| )[^|]*(?= \|)")


def in_words(seconds: float) -> str:
    """To half a minute, as the head of a chapter says it."""
    halves = round(seconds / 30)
    return HALF_MINUTES[halves] if halves < len(HALF_MINUTES) else f"{round(seconds / 60)} minutes"


def in_short(seconds: dict[str, float]) -> str:
    """The range over chapters and the sum, as README says it."""
    low, high = (round(f(seconds.values()), -1) for f in (min, max))
    return f"{low:.0f} to {high:.0f} s each, {sum(seconds.values()) / 60:.0f} minutes in all"


def record(timings: list[dict]) -> None:
    seconds = {timing["chapter"]: timing["seconds"] for timing in timings}
    machine = f"one core of {os.cpu_count()}, {platform.system()} {platform.machine()}"
    TIMES.write_text(
        json.dumps({"machine": machine, "seconds": seconds}, indent=2) + "\n", encoding="utf-8"
    )
    readme = ROOT / "README.md"
    readme.write_text(
        README_ROW.sub(in_short(seconds), readme.read_text(encoding="utf-8")), encoding="utf-8"
    )
    for chapter, spent in seconds.items():
        source = ROOT / "notebooks" / f"{chapter}.py"
        source.write_text(
            HEAD.sub(in_words(spent) + " ", source.read_text(encoding="utf-8"), count=1),
            encoding="utf-8",
        )


def print_table(timings: list[dict]) -> None:
    noted = json.loads(TIMES.read_text(encoding="utf-8"))
    print(
        "```{table} Seconds that each chapter took: for this site, and when its head was written."
    )
    print(":name: tab-times\n")
    print("| chapter | execution time (s) | noted (s) | executed |")
    print("|:--|--:|--:|:--|")
    for timing in timings:
        day = time.strftime("%Y-%m-%d", time.gmtime(timing["finished"]))
        told = noted["seconds"].get(timing["chapter"])
        told = "–" if told is None else f"{told:.1f}"
        name = f"{{doc}}`/chapters/{timing['chapter']}`"
        print(f"| {name} | {timing['seconds']:.1f} | {told} | {day} |")
    total = sum(timing["seconds"] for timing in timings)
    print(f"| all chapters | {total:.1f} | {sum(noted['seconds'].values()):.1f} | |\n```")
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"\nExecuted with one thread per chapter on {machine}.")
    print(f"Python {platform.python_version()}, {versions}.")
    print(f"The times that heads and README tell were noted on {noted['machine']}.")


def main(paths: list[str]) -> None:
    timings = [
        json.loads(Path(path).read_text(encoding="utf-8")) for path in paths if path != "--record"
    ]
    (record if "--record" in paths else print_table)(timings)


if __name__ == "__main__":
    main(sys.argv[1:])
