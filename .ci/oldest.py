"""Print the oldest versions that pyproject.toml allows, as constraints for pip. Arguments are versions to take instead.

Example: ``python .ci/oldest.py torch==2.13.0 > oldest.txt && pip install --constraint oldest.txt .``
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
floors = dict(re.findall(r"^([\w-]+)(?:\[.*\])?>=([\w.]+)$", "\n".join(requirements), re.M))
floors |= dict(given.split("==") for given in sys.argv[1:])
print("\n".join(f"{name}=={version}" for name, version in floors.items()))
