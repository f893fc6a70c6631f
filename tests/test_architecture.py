"""docs/architecture.md matches the code: its layers, and the files that a step and a save enter."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Run, check
from test_imports import LAYERS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
TRACED = """
import collections, json, os, sys, threading
import distrib
from tasks import Masked

FOLDER = os.path.dirname(distrib.__file__) + os.sep
STEP, SAVED_AFTER = 3, 6
entered, phase, steps = collections.defaultdict(set), "start", 0

def trace(frame, event, _):
    global phase, steps
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    if event != "call" or not file.startswith(FOLDER):
        return
    if threading.current_thread() is not threading.main_thread():
        target = getattr(threading.current_thread(), "_target", None)
        if getattr(target, "__name__", "") == "_work":  # the thread that saves
            entered["save"].add(file.removeprefix(FOLDER))
        return
    if file.endswith("training/trainer.py") and name == "_step":
        phase, steps = f"step {steps}", steps + 1
    elif file.endswith("training/trainer.py") and name == "_save" and steps == SAVED_AFTER:
        phase = "save"
    elif file.endswith("training/trainer.py") and name == "_report_saves" and phase == "save":
        phase = "saved"
    entered[phase].add(file.removeprefix(FOLDER))

config = {
    "name": "traced",
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": SAVED_AFTER + 1},
    "checkpoint": {"every_steps": SAVED_AFTER},
    "tracking": {"wandb": "off"},
}
trainer = distrib.Trainer(Masked(), distrib.Config.from_dict(config))
if trainer.world.is_rank_0:
    threading.setprofile(trace)
    sys.setprofile(trace)
trainer.fit()
sys.setprofile(None)
if trainer.world.is_rank_0:
    with open("entered.json", "w") as file:
        json.dump({"step": sorted(entered[f"step {STEP}"]), "save": sorted(entered["save"])}, file)
"""


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_page_lists_the_layers_of_test_imports() -> None:
    listed = re.search(r"(?:^    \S.*\n)+", PAGE, re.MULTILINE)
    assert listed is not None
    shown = [set(line.strip().split(", ")) for line in listed.group().splitlines()]
    assert shown == [layer - {"__version__"} for layer in reversed(LAYERS)]


@pytest.fixture(scope="module")
def page_files() -> dict[str, set[str]]:
    return {
        name: set(re.findall(r"`((?:\w+/)*\w+\.py)`", section(heading)))
        for name, heading in {"step": "One training step", "save": "One save"}.items()
    }


def test_a_step_and_a_save_enter_the_files_on_the_page(
    run: Run, tmp_path: Path, page_files: dict[str, set[str]]
) -> None:
    """Trace an ordinary step and a save with its thread, on rank 0 of two processes under ddp."""
    (tmp_path / "traced.py").write_text(TRACED)
    check(run("distrib", "launch", "--processes", 2, "traced.py"))
    entered = json.loads((tmp_path / "entered.json").read_text())
    for name, heading in {"step": "One training step", "save": "One save"}.items():
        assert set(entered[name]) == page_files[name], f"docs/architecture.md, {heading}"
        assert re.search(rf"traced: {len(entered[name])}\s+files", section(heading)), len(entered[name])
