"""Cores of a process, and when it collects garbage."""

import gc
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from distrib.tuning import no_collection, threads


def test_cores_are_shared() -> None:
    own = threads(1)
    assert 1 <= own <= len(os.sched_getaffinity(0))
    assert threads(10**6) == 1
    one = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from distrib.tuning import threads; print(threads(1))"
    )
    assert subprocess.run([sys.executable, "-c", one], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_as_before_afterwards(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with suppress(ZeroDivisionError), no_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
