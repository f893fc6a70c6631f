"""One process of a contender, started by resuming.py: saving_member.py CONTENDER WORKLOAD SAVES STEP RESUMED FOLDER

It makes SAVES saves. If STEP is not 0, the step after them reads the samples of step STEP. RESUMED is 1 or 0.
"""

import sys
from importlib import import_module
from pathlib import Path

from numbered import WORKLOADS, Numbered
from saves import Part, skip_reading

if __name__ == "__main__":
    contender, name, saves, step, resumed, folder = sys.argv[1:]
    part = Part(Path(folder), int(saves), int(step), resumed == "1")
    if part.step:
        skip_reading(part.step)
    import_module(contender).save(Numbered(*WORKLOADS[name]), part)
