"""On a real terminal there is a bar, elsewhere there are lines."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment, on_a_terminal

TRAIN = ["-m", "distrib", "train", str(ROOT / "configs/digits.yaml"), "train.steps=8"]


def test_a_bar_on_a_terminal(mark: str, tmp_path: Path) -> None:
    text, code = on_a_terminal(mark, tmp_path, *TRAIN[2:])
    assert code == 0, text
    assert "━" in text
    assert "8/8" in text
    assert "runs/digits finished: eval/accuracy" in text


def test_lines_in_a_log_file(mark: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            [sys.executable, *TRAIN], cwd=tmp_path, stdout=log, stderr=log, env=environment(mark), check=True
        )
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("step 8/8  epoch 0  loss ")
    assert lines[-1].startswith("runs/digits finished: eval/accuracy")
    assert not any("━" in line or "\x1b" in line for line in lines)
