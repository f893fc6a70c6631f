"""Profiles of steps as a table."""

import cProfile
import pstats
from pathlib import Path

TOP = 15  # functions


def table(profile: cProfile.Profile | str, steps: int, title: str) -> list[str]:
    """Return the functions that took the most time of these steps. `profile`: a profile or its file. The profiler makes
    Python look slower than C."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = ["", f"| {title}, own us a step | with inner | calls | |", "|--:|--:|--:|---|"]
    by_own = sorted(stats.items(), key=lambda item: item[1][2], reverse=True)
    for (file, line, name), (_, calls, own, inner, _) in by_own[:TOP]:
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} {name}"
        rows.append(f"| {own / steps * 1e6:.1f} | {inner / steps * 1e6:.1f} | {calls / steps:.1f} | `{where}` |")
    rest = sum(of_function[2] for _, of_function in by_own[TOP:])
    return [*rows, f"| {rest / steps * 1e6:.1f} | | | all others |"]
