"""What is installed here: each dependency of the package beside the version it asks for, and what can be imported.

    python experiments/gpu/environment.py --out environment.json

Needs nothing but Python, so it can say what is missing. A GPU's image often brings its own torch.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import re
import tomllib
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXTRA = ("triton", "beartype", "pytest")
"""Packages beside the dependencies and those of Hugging Face decoders: the compiler of kernels, and what tests need."""
MODULES = ("models", "gradients", "training", "data", "inference", "cli.main")
"""What jobs import from the package."""


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def fits(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ``>=2.6,<2.14``."""
    limits = [(sign, numbers(limit)) for sign, limit in re.findall(r"(>=|<)\s*([\d.]+)", bounds)]
    found = numbers(version)
    return all(found >= limit if sign == ">=" else found < limit for sign, limit in limits)


def dependency(requirement: str) -> dict[str, Any]:
    """The row of a requirement such as ``jsonargparse[signatures]>=4.53,<5``."""
    name, _, bounds = re.findall(r"([\w-]+)(\[.*\])?(.*)", requirement)[0]
    version = installed(name)
    state = "missing" if version is None else "ok" if fits(version, bounds) else "outside the bounds"
    return {"what": name, "asked for": bounds, "here": version, "state": state}


def importing(module: str) -> dict[str, Any]:
    """The row of a module: whether it can be imported, and the traceback if not."""
    row = {"what": f"import {module}", "asked for": "", "here": None}
    try:
        importlib.import_module(module)
    except Exception:
        return {**row, "state": "fails", "traceback": traceback.format_exc()}
    return {**row, "state": "ok"}


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = (*project["dependencies"], *project["optional-dependencies"]["hf"], *EXTRA)
    rows = [dependency(each) for each in asked]
    rows += [importing(module) for module in ("memformer_pl", *(f"memformer_pl.{each}" for each in MODULES))]
    settings = {"python": platform.python_version(), "asked for": project["requires-python"]}
    out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
