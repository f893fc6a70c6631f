"""The benchmarks run, and the contenders compute the same. Their measurements are in benchmarks/results/."""

import sys

import pytest
from conftest import ROOT, Run, check

pytestmark = pytest.mark.timeout(900)
CONTENDERS = ("plain DDP loop", "distrib", "accelerate", "transformers")


def test_peers_compute_the_same_and_take_turns(run: Run) -> None:
    """The benchmark fails if losses differ."""
    script = ROOT / "benchmarks" / "peers.py"
    said = check(run(sys.executable, script, "--only", "digits 2", "--sessions", 1, "--small", timeout=600))
    assert "## digits, 2 process(es)" in said
    for contender in CONTENDERS:
        assert f"| {contender} |" in said


def test_the_benchmark_detects_who_resumes_at_the_right_sample(run: Run) -> None:
    script = ROOT / "benchmarks" / "resuming.py"
    said = check(run(sys.executable, script, "--only", "late", "--rounds", 1, "--small", timeout=850))
    assert "## late: resumed at step " in said
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    for contender in CONTENDERS:
        assert rows[contender].endswith("| yes | yes |"), said
    if "Lightning" in rows:
        assert rows["Lightning"].endswith("| **no** | **no** |"), said
        assert "Lightning: after its resume it began its epoch again." in said
        assert rows["Lightning, stateful"].endswith("| yes | yes |"), said
