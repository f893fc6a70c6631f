"""Runs that are killed at random moments and started again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, check, environment, no_process_left


@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["Sharded"])
def test_other_orders_of_samples_killed_at_random_moments(tmp_path: Path, task: str) -> None:
    """And started again on 1, 2 or 4 processes; see data_crashes.py."""
    with no_process_left() as mark:
        script = ROOT / "tests" / "distributed" / "data_crashes.py"
        command = [sys.executable, str(script), str(tmp_path), "4", task]
        result = subprocess.run(command, env=environment(mark), capture_output=True, text=True, timeout=800)
        worlds = json.loads(check(result).splitlines()[-1])
    assert {1, 2, 4} == {world for row in worlds for world in row}
    assert [2, 2] in worlds


@pytest.mark.timeout(900)
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL to one rank or both, in training, evaluation and saving, for 8 seeds; see crashes.py."""
    with no_process_left() as mark:
        script = ROOT / "tests" / "distributed" / "crashes.py"
        command = [sys.executable, str(script), str(tmp_path), "8"]
        result = subprocess.run(command, env=environment(mark), capture_output=True, text=True, timeout=800)
        places = json.loads(check(result).splitlines()[-1])
    assert len(set(places)) > 4  # resumed from many different steps
