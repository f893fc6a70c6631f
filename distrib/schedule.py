"""The learning rate schedule: a pure function of the number of updates made."""

import math


def learning_rate_factor(update: int, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Return the factor, between 0 and 1, by which the base rate is multiplied at `update` (0-based).

    Warmup rises linearly and reaches 1 after `warmup_steps` updates. `linear` and `cosine` then decay, and would reach
    0 at update `num_steps`, which is one past the last.
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
