"""Runs all benchmarks, each with its own results: python benchmarks/all.py (an hour on two cores)"""

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "peers",
    "overhead",
    "strategies",
    "compiling",
    "bitwise",
    "ema",
    "muon",
    "tracking",
    "saving",
    "resuming",
    "late_resume",
)


def main() -> None:
    failed = [
        script
        for script in SCRIPTS
        if subprocess.run([sys.executable, Path(__file__).with_name(f"{script}.py")]).returncode
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
