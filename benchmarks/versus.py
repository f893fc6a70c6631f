"""Compares another checkout of distrib with this one: runs of overhead.py from each, alternately.

python benchmarks/versus.py ../other             run with two processes, five times each
python benchmarks/versus.py ../other -p 1 -n 9   with one process, nine times each
"""

import argparse
import os
import statistics
from pathlib import Path

from alternating import ROOT, measure


def main() -> None:
    parser = argparse.ArgumentParser(description="step times of two checkouts, relative to the plain loop in each run")
    parser.add_argument("other", type=Path, help="the folder of the other checkout")
    parser.add_argument("-p", "--processes", type=int, default=2)
    parser.add_argument("-n", "--runs", type=int, default=5, help="of each checkout")
    arguments = parser.parse_args()
    ratios: dict[Path, list[float]] = {ROOT: [], arguments.other.resolve(): []}
    for _ in range(arguments.runs):
        for checkout, found in ratios.items():
            os.environ["PYTHONPATH"] = str(checkout)
            case = measure(str(checkout / "benchmarks" / "overhead.py"), arguments.processes, 1.0)
            found.append(case["ratio"]["median"])
    for checkout, found in ratios.items():
        runs = " ".join(f"{ratio:.3f}" for ratio in found)
        print(f"{checkout}: distrib / plain loop {statistics.median(found):.3f} (runs: {runs})")


if __name__ == "__main__":
    main()
