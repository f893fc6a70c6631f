"""The learning rate as a pure function of the number of updates made."""

import math


def learning_rate_factor(update: int, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """What the base rate is multiplied by at `update` (0-based), between 0 and 1.

    Warmup rises in a line and reaches 1 after `warmup_steps` updates; linear and cosine then fall, and would reach 0
    at update `num_steps`, the first that is not made.
    """
    if update < warmup_steps:
        return (update + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (update - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - done
    assert schedule == "cosine", schedule
    return 0.5 * (1.0 + math.cos(math.pi * done))
