"""One process of a contender, as peers.py starts it: member.py CONTENDER WORKLOAD BLOCKS STEPS FOLDER"""

import sys
from importlib import import_module
from pathlib import Path

from turns import Length
from workload import workload

if __name__ == "__main__":
    contender, name, blocks, steps, folder = sys.argv[1:]
    import_module(contender).run(workload(name), Length(int(blocks), int(steps)), Path(folder))
