"""Every sample exactly once, and the same bits from any number of processes."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, Run, check


@pytest.fixture(scope="module")
def alone(module_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return evaluations(module_run, tmp_path_factory.mktemp("alone"), 1)


def evaluations(run: Run, folder: Path, world: int) -> dict[str, dict[str, str]]:
    """The metrics, as hexadecimal floats: the task itself asserts that all indices are there, in order."""
    script = ROOT / "tests/distributed/evaluations.py"
    check(run("distrib", "launch", "--processes", world, script, folder / "found.json"))
    found: dict[str, dict[str, str]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_metrics_equal_those_of_one_process_bit_for_bit(
    run: Run, tmp_path: Path, world: int, alone: dict[str, dict[str, str]]
) -> None:
    assert len(alone) == 39 * 3
    for name, metrics in alone.items():
        assert float.fromhex(metrics["samples"]) == int(name.split()[0])
    assert evaluations(run, tmp_path, world) == alone
