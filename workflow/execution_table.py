"""Print the table of execution times and versions: execution_table.py TIMING.json ...

The page book/reproducing.md includes it; links are relative to that page's folder.
"""

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ["torch", "numpy", "papermill", "jupyter-book"]


def main(paths: list[str]) -> None:
    print("| chapter | execution time (s) | executed |")
    print("|:--|--:|:--|")
    total = 0.0
    for path in paths:
        timing = json.loads(Path(path).read_text(encoding="utf-8"))
        total += timing["seconds"]
        day = time.strftime("%Y-%m-%d", time.gmtime(timing["finished"]))
        print(f"| {{doc}}`/chapters/{timing['chapter']}` | {timing['seconds']:.1f} | {day} |")
    print(f"| all chapters | {total:.1f} | |")
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"\nExecuted with one thread per chapter on {machine}.")
    print(f"Python {platform.python_version()}, {versions}.")


if __name__ == "__main__":
    main(sys.argv[1:])
