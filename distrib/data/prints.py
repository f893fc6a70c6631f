"""Prints of samples: what a fingerprint of a dataset is made of, and when two may be of one sample.

Commands that only read a run folder need this, and not torch: data/fingerprint.py makes the prints.
"""

from typing import Any, TypeAlias

# By how much the figures of two prints may differ, relatively; 'coarse' are 8-bit pixels and half-precision numbers.
TOLERANCES = {"float": 1e-4, "coarse": 1e-2}
VARIES, UNKNOWN = "varies", "unknown"  # stand in place of a sample's print; such samples are not compared

Print: TypeAlias = dict[str, Any] | str
Fingerprint: TypeAlias = dict[str, Any]  # length, and samples: {index: print}; indices are strings, as in JSON


def same(first: Print, second: Print) -> bool:
    """Whether two prints may be of one sample."""
    if isinstance(first, str) or isinstance(second, str):
        return True
    if first["exact"] != second["exact"]:
        return False
    return all(_close(first[kind], second[kind], tolerance) for kind, tolerance in TOLERANCES.items())


def _close(first: list[float], second: list[float], tolerance: float) -> bool:
    """Figures as data/fingerprint.py makes them: the first is a scale, the others are relative to it."""
    scale, other = first[0], second[0]
    near = abs(scale - other) <= tolerance * max(scale, other)
    return near and all(abs(a - b) <= tolerance for a, b in zip(first[1:], second[1:], strict=False))
