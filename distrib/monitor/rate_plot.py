"""The learning rate over a run, drawn in text."""

from collections.abc import Callable, Iterable

_WIDTH, _HEIGHT = 48, 3  # characters
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_POINTS = 10_000


def plot(rate: Callable[[int], float], num_steps: int, landmarks: Iterable[int] = ()) -> str:
    """Return a plot of a few lines, and below it the first rate, the peak and the last rate.

    `landmarks`: updates that may be the highest; of a long run, not every update is looked at.
    """
    last = num_steps - 1
    points = min(num_steps, _MOST_POINTS)
    looked_at = {last * point // max(1, points - 1) for point in range(points)} | set(landmarks)
    highest = max(sorted(looked_at), key=rate)
    top = rate(highest) or 1.0
    columns = [rate(last * column // (_WIDTH - 1)) / top for column in range(_WIDTH)]
    lines = [_line(columns, row).rstrip() for row in reversed(range(_HEIGHT))]
    ends = [f"first {rate(0):.3g}", f"peak {rate(highest):.3g}", f"last {rate(last):.3g}"]
    return "\n".join([*lines, ", ".join(ends)])


def _line(columns: list[float], row: int) -> str:
    """Return a line of the plot, `row` lines above its bottom. The bottom shows a rate above 0 as at least a little."""
    levels = len(_BLOCKS) - 1
    heights = [max(value * _HEIGHT * levels, 1.0 * (value > 0)) for value in columns]
    return "".join(_BLOCKS[min(levels, max(0, round(height) - row * levels))] for height in heights)
