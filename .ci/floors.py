"""Print, as constraints for pip, the lowest version of each dependency that pyproject.toml allows."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for required in (project["dependencies"], *project["optional-dependencies"].values()):
    for one in required:
        if ">=" in one:
            print(one.replace(">=", "=="))
