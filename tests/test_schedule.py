import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrib.schedule import learning_rate_factor

NAMES = st.sampled_from(["constant", "linear", "cosine"])


@given(NAMES, st.integers(0, 50), st.integers(1, 500))
def test_the_factor_stays_between_0_and_1_and_reaches_1(name: str, warmup: int, extra: int) -> None:
    steps = warmup + extra
    factors = [learning_rate_factor(update, name, warmup, steps) for update in range(steps)]
    assert factors[:warmup] == sorted(factors[:warmup])
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[warmup] == 1.0
    falling = factors[warmup:]
    assert falling == sorted(falling, reverse=True)
    if name == "constant":
        assert set(falling) == {1.0}
    else:
        assert learning_rate_factor(steps, name, warmup, steps) == pytest.approx(0, abs=1e-15)


def test_values_at_known_steps() -> None:
    assert learning_rate_factor(50, "linear", 0, 100) == 0.5
    assert learning_rate_factor(50, "cosine", 0, 100) == pytest.approx(0.5)
    assert learning_rate_factor(25, "cosine", 0, 100) == pytest.approx(0.853553390593)
    assert learning_rate_factor(4, "constant", 9, 100) == 0.5
