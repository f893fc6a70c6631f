"""DataLoader workers ignore SIGTERM, so a process would wait for them at its end if their loader were still there."""

from pathlib import Path

import pytest
import yaml
from conftest import Run, check

SCRIPT = """
from tasks import Masked, Misbehaving
from distrib import Config, Trainer
trainer = Trainer({task}, Config.load("run.yaml"))
{before}
trainer.fit()
"""


KEPT = """
try:
    trainer.fit()
except Exception as error:
    kept = error
exit()
"""


@pytest.mark.parametrize(
    ("task", "before", "code"),
    [
        ("Masked()", "", 0),  # the name keeps the trainer to the end
        ("Masked()", "trainer.itself, trainer = trainer, trainer.fit(); exit()", 0),  # only a cycle keeps it
        ("Misbehaving(how='nan', at=10)", "", 1),
        ("Misbehaving(how='nan', at=10)", KEPT, 0),
    ],
)
def test_a_script_ends_with_its_workers(run: Run, tmp_path: Path, task: str, before: str, code: int) -> None:
    config = {
        "data": {"global_batch_size": 16, "micro_batch_size": 4, "num_workers": 1},
        "train": {"steps": 12, "on_nonfinite": "stop"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "script.py").write_text(SCRIPT.format(task=task, before=before))
    check(run("distrib", "launch", "--processes", 2, "script.py"), code=code)
