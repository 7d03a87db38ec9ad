"""Write environment.yml, the conda door to the pins of requirements.lock.

pip takes no unhashed or editable requirement beside hashed ones, so the pins stand here without
their hashes, then torch, then this project's own package.
"""

import re
from pathlib import Path

from environment import ROOT, torch_pin

HEADER = """\
# Written by `make lock` from requirements.lock; use: conda env create -f environment.yml
name: amortised
channels:
  - conda-forge
dependencies:
  - python >=3.11,<3.14
  - pip
  - pip:
"""


def pins() -> list[str]:
    """The lock's requirements with their markers, without their hashes."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return [line.rstrip(" \\") for line in lock.splitlines() if re.match(r"\w", line)]


def environment() -> str:
    requirements = [*pins(), torch_pin(), "-e ."]
    return HEADER + "".join(f"      - {requirement}\n" for requirement in requirements)


if __name__ == "__main__":
    Path(ROOT / "environment.yml").write_text(environment(), encoding="utf-8")
