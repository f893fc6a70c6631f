"""Compares prints of samples, the parts of a dataset's fingerprint.

data/fingerprint.py computes them. This module is separate because commands that only read a run folder need no torch.
"""

from typing import Any, TypeAlias

# Relative tolerances for the statistics of two prints. 'coarse': 8-bit pixels and half-precision numbers.
TOLERANCES = {"float": 1e-4, "coarse": 1e-2}
VARIES, UNKNOWN = "varies", "unknown"  # recorded instead of a print; such samples are not compared

Print: TypeAlias = dict[str, Any] | str
Fingerprint: TypeAlias = dict[str, Any]  # keys: length, samples ({index: print}; indices are strings, as in JSON)


def same(first: Print, second: Print) -> bool:
    """Return whether two prints can come from the same sample."""
    if isinstance(first, str) or isinstance(second, str):
        return True
    if first["exact"] != second["exact"]:
        return False
    return all(_close(first[kind], second[kind], tolerance) for kind, tolerance in TOLERANCES.items())


def _close(first: list[float], second: list[float], tolerance: float) -> bool:
    """Compare statistics from data/fingerprint.py: the first is a scale, the others are relative to it."""
    scale, other = first[0], second[0]
    near = abs(scale - other) <= tolerance * max(scale, other)
    return near and all(abs(a - b) <= tolerance for a, b in zip(first[1:], second[1:], strict=False))
