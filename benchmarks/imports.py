"""Measures time and memory of distrib's imports, compared with torch's: python benchmarks/imports.py"""

import functools
import importlib
import json
import subprocess
import sys
import time

# What any loop over torch's DDP and optimizers has imported by its first step; then ours, in this order.
WITH_TORCH = ("torch", "torch.distributed", "torch._dynamo", "numpy")
OURS = ("psutil", "yaml", "pydantic.main", "distrib.config", "accelerate", "rich.progress", "distrib.training.trainer")


@functools.cache  # the same for each case of peers.py
def measured() -> dict[str, tuple[float, float]]:
    """Measure the seconds and the MB of memory that each of OURS takes to import after those before it. It runs in the
    second of two new processes, so that all modules are compiled."""
    command = [sys.executable, __file__, "--member"]
    for _ in range(2):
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, tuple[float, float]] = json.loads(done.stdout)
    return found


def table() -> list[str]:
    found = measured()
    seconds, megabytes = (sum(column) for column in zip(*found.values(), strict=True))
    rows = ["| imported, after torch | s | MB |", "|---|---|---|"]
    rows += [f"| {module} | {second:.3f} | {megabyte:.1f} |" for module, (second, megabyte) in found.items()]
    return [*rows, f"| together | {seconds:.3f} | {megabytes:.1f} |"]


def _import_all() -> dict[str, tuple[float, float]]:
    for module in WITH_TORCH:
        importlib.import_module(module)
    found = {}
    for module in OURS:
        began, before = time.perf_counter(), _megabytes()
        importlib.import_module(module)
        found[module] = (time.perf_counter() - began, _megabytes() - before)
    return found


def _megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    print(json.dumps(_import_all()) if "--member" in sys.argv else "\n".join(table()))
