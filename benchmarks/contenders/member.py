"""One process of a contender, started by peers.py: member.py CONTENDER WORKLOAD BLOCKS STEPS FOLDER"""

import sys
from importlib import import_module
from pathlib import Path

from tasks import WORKLOADS
from turns import Length

if __name__ == "__main__":
    contender, name, blocks, steps, folder = sys.argv[1:]
    import_module(contender).run(WORKLOADS[name](), Length(int(blocks), int(steps)), Path(folder))
