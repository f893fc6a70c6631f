"""`distrib verify` finds and names changes in a run folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tasks import Masked

from distrib import Config, Trainer
from distrib.errors import CheckpointError, LedgerError
from distrib.run_folder.ledger import link
from distrib.run_folder.verify import verify_run

STEPS = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = {"seed": 5, "train": {"steps": STEPS}, "checkpoint": {"every_steps": 5}}
    config["data"] = {"global_batch_size": 16, "micro_batch_size": 8}
    Trainer(Masked(), Config.from_dict(config), folder).fit()
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def rewrite(run_dir: Path, change: Callable[[list[str]], None]) -> None:
    path = run_dir / "steps.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    change(lines)
    path.write_text("".join(lines))


def test_a_valid_run(finished: Path, run: Run) -> None:
    found = verify_run(finished)
    assert (found.steps, found.of_steps, found.samples, found.checkpoints) == (STEPS, STEPS, STEPS * 16, 3)
    said = check(run("distrib", "verify", finished))
    assert "12 of 12 steps, all in order, 192 samples where they belong, chain intact, 3 checkpoint(s) whole" in said


def test_a_missing_ledger_line_is_found(run_dir: Path, run: Run) -> None:
    rewrite(run_dir, lambda lines: lines.pop(4))
    result = run("distrib", "verify", run_dir)
    check(result, code=1)
    assert "steps.jsonl line 5: is of step 5, where step 4 belongs; step 4 is missing before it" in result.stderr


def test_a_repeated_ledger_line_is_found(run_dir: Path) -> None:
    rewrite(run_dir, lambda lines: lines.insert(4, lines[3]))
    with pytest.raises(LedgerError, match="line 5: is of step 3, where step 4 belongs; step 3 is there already"):
        verify_run(run_dir)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), flip=st.integers(1, 127))
def test_any_changed_character_is_found(finished: Path, tmp_path: Path, place: int, flip: int) -> None:
    run_dir = tmp_path / "run"
    if not run_dir.exists():
        shutil.copytree(finished, run_dir)
    whole = (finished / "steps.jsonl").read_bytes()
    changed = bytearray(whole)
    changed[place % len(whole)] ^= flip
    (run_dir / "steps.jsonl").write_bytes(changed)
    with pytest.raises(LedgerError):
        verify_run(run_dir)


def test_lines_missing_at_the_end_are_found(run_dir: Path) -> None:
    rewrite(run_dir, lambda lines: lines.pop())
    with pytest.raises(LedgerError, match=r"step-00000012: the ledger's chain after step 12 is not"):
        verify_run(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    with pytest.raises(LedgerError, match="ends after 11 steps, but the run has ended after 12"):
        verify_run(run_dir)
    (run_dir / "summary.json").unlink()  # without it, the run has not ended
    assert verify_run(run_dir).steps == 11


def test_other_samples_with_a_valid_chain_are_found(run_dir: Path) -> None:
    """Anyone who can write the ledger can compute its chain, but the samples do not match the config."""

    def forge(lines: list[str]) -> None:
        chain = ""
        for number, line in enumerate(lines):
            entry = json.loads(line)
            del entry["chain"]
            if number == 7:
                entry["samples"] = "0123456789abcdef"
            text = json.dumps(entry, separators=(",", ":"))
            chain = link(chain, text)
            lines[number] = f'{text[:-1]},"chain":"{chain}"}}\n'

    rewrite(run_dir, forge)
    with pytest.raises(LedgerError, match="line 8: step 7 read samples with the digest 0123456789abcdef"):
        verify_run(run_dir)


def test_another_seed_in_the_config_is_found(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("seed: 5", "seed: 6"))
    with pytest.raises(LedgerError, match=r"config\.yaml: damaged: seed was 5, is 6"):  # the checkpoint has a copy
        verify_run(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(LedgerError, match="line 1: step 0 read samples"):
        verify_run(run_dir)


def test_a_damaged_checkpoint_is_found(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-00000005" / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000005.*damaged"):
        verify_run(run_dir)
