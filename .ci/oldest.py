"""Prints the oldest versions that pyproject.toml allows, as constraints for pip or uv."""

from __future__ import annotations

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["experiments"] + extras["test"]:
    if ">=" in requirement:
        print(requirement.replace(">=", "=="))
