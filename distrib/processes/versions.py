"""The versions that decide what is computed, the same on all ranks of a run."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("distrib", "torch", "accelerate", "deepspeed", "numpy")


def versions() -> dict[str, str | None]:
    """Of Python and of the libraries that decide what is computed; torch's with its build, as in 2.11.0+cu130."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {**found, "torch": str(torch.__version__)}  # metadata may lack the build


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
