"""On a real terminal there is a bar, elsewhere there are lines."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment

TRAIN = ["-m", "distrib", "train", str(ROOT / "configs/digits.yaml"), "train.steps=8"]


def test_a_bar_on_a_terminal(mark: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *TRAIN], cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment(mark, TERM="xterm")
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    text = seen.decode()
    assert process.returncode == 0, text
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
