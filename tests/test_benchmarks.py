"""That the benchmarks run, and that who is compared computes the same. What they measure is in benchmarks/results/."""

import pytest
from conftest import ROOT, Run, check

pytestmark = pytest.mark.timeout(900)


def test_peers_compute_the_same_and_take_turns(run: Run) -> None:
    """Losses that differ end it."""
    said = check(run("python", ROOT / "benchmarks" / "peers.py", "--only", "digits 2", "--sessions", 1, timeout=600))
    assert "## digits, 2 process(es)" in said
    for contender in ("plain DDP loop", "distrib", "accelerate", "transformers"):
        assert f"| {contender} |" in said
