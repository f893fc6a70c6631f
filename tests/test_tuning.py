"""Cores, memory, scheduling and garbage collection of a process."""

import gc
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Run, check

from distrib.processes.tuning import no_collection, run_as_batch, threads


def test_threads_share_the_cores() -> None:
    own = threads(1)
    assert 1 <= own <= len(os.sched_getaffinity(0))
    assert threads(10**6) == 1
    one = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from distrib.processes.tuning import threads; print(threads(1))"
    )
    assert subprocess.run([sys.executable, "-c", one], capture_output=True, text=True, check=True).stdout == "1\n"


# Allocates and frees a step's tensors four times, and prints the number of page faults of each time.
STEPS = """
import resource, torch
from distrib.processes.tuning import keep_freed_memory
keep_freed_memory()
def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(4):
    before = pages()
    tensors = [torch.ones(2**20) for _ in range(20)]
    del tensors
    print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
@pytest.mark.parametrize("asked_otherwise", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_unless_the_user_has_set_malloc(asked_otherwise: dict[str, str]) -> None:
    environment = {**os.environ, **asked_otherwise}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=True)
    first, *_, last = map(int, done.stdout.split())
    if asked_otherwise:
        assert last > first / 2
    else:
        assert last < first / 100


POLICIES = """
import os
from pathlib import Path
from distrib.processes.world import World
world = World.detect()
world.connect()
threads = [thread for thread in Path("/proc/self/task").iterdir() if "gloo" in (thread / "comm").read_text()]
policies = world.all_gather_object({os.sched_getscheduler(int(thread.name)) for thread in threads})
if world.is_rank_0:
    print("policies:", policies)
world.shutdown()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="policies are Linux's")
def test_threads_of_a_run_use_sched_batch(run: Run, tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text(POLICIES)
    said = check(run("distrib", "launch", "--processes", 2, "policies.py"))
    assert f"policies: {[{os.SCHED_BATCH}] * 2}" in said


@pytest.mark.skipif(sys.platform != "linux", reason="policies are Linux's")
def test_a_scheduling_policy_of_the_user_is_kept() -> None:
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        run_as_batch()
        assert os.sched_getscheduler(0) == os.SCHED_IDLE
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_collection_is_restored(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with suppress(ZeroDivisionError), no_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
