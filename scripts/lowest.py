"""Prints the lower bounds of what users install, the extra `cli` included, as pip constraints (`trio==0.30`)."""

from __future__ import annotations

import pathlib
import re
import sys
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text("utf-8"))["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["cli"]]:
    found = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement)
    if found:
        sys.stdout.write(f"{found[1]}=={found[2]}\n")
