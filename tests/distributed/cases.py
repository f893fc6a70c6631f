"""Run as a member by `distrib launch`: trains all cases of a JSON file, one after the other, in the same processes.

Starting processes is what costs time in these tests, so that one launch serves many cases.
"""

import json
import sys
from pathlib import Path

from distrib import Config, Trainer
from distrib.task import load_task

folder = Path(sys.argv[1])
for case in json.loads((folder / "cases.json").read_text()):
    config = Config.from_dict(case["config"])
    Trainer(load_task(config.task), config, folder / case["run"]).fit()
