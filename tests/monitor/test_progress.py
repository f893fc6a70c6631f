"""The display draws a bar on a real terminal, and prints lines elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment, on_a_terminal
from hypothesis import given
from hypothesis import strategies as st

from distrib.monitor.progress import fitting

TRAIN = ["-m", "distrib", "train", str(ROOT / "configs/digits.yaml"), "train.steps=8", "optim.warmup_steps=0"]


def test_a_bar_on_a_terminal(mark: str, tmp_path: Path) -> None:
    text, code = on_a_terminal(mark, tmp_path, *TRAIN[2:])
    assert code == 0, text
    assert text.startswith(f"distrib: loading {ROOT / 'configs/digits.yaml'}\r\n")  # before torch is imported
    assert "━" in text
    state = r"epoch \d+  loss \d+\.\d{4}  lr \d\.\d\de[+-]\d\d  [\d,]+ samples/s  \d:\d\d:\d\d left"  # nothing is cut
    shown = re.findall(r"epoch \d+  loss [^\r\n\x1b]*", text)
    assert shown
    assert [line for line in shown if not re.fullmatch(state, line.rstrip())] == []
    assert "8/8" in text
    assert "runs/digits finished: eval/accuracy" in text


@given(st.lists(st.text("ab1.", min_size=1), max_size=6), st.integers(1, 40))
def test_a_line_holds_whole_parts(parts: list[str], width: int) -> None:
    line = fitting(parts, width)
    assert len(line) <= width
    whole = next(count for count in range(len(parts), -1, -1) if "  ".join(parts[:count]) == line)
    assert whole == len(parts) or len("  ".join(parts[: whole + 1])) > width


def test_lines_in_a_log_file(mark: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            [sys.executable, *TRAIN], cwd=tmp_path, stdout=log, stderr=log, env=environment(mark), check=True
        )
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("step 8/8  epoch 0  loss ")
    assert lines[-1].startswith("runs/digits finished: eval/accuracy")
    assert not any("━" in line or "\x1b" in line for line in lines)
