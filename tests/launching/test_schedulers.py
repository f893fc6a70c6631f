"""Schedulers that other packages bring: found by their entry points, checked, and used for everything that SLURM is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    Run,
    check,
    environment,
    events,
    free_port,
    lines,
    processes_of,
    refused,
    start,
    steps_done,
    until,
)

from distrib.plugins import OWN, SCHEDULERS

# A batch system that runs a job as soon as it gets it: real processes, and a queue that is a folder.
HERD = '''
import os
import shlex

from distrib import Scheduler


class Herd(Scheduler):
    name = "herd"
    title = "the Herd"
    script_name = "herd.sh"
    seconds_to_requeue = 5.0

    @classmethod
    def detect(cls, environ):
        return "HERD_JOB" in environ

    @property
    def job(self):
        return self.environ["HERD_JOB"]

    @property
    def host(self):
        return f"cow{self.environ['HERD_TASK']}"

    @property
    def cpus_per_task(self):
        return 1

    def rank_variables(self):
        task, tasks = int(self.environ["HERD_TASK"]), self.environ["HERD_TASKS"]
        return {
            "RANK": task,
            "LOCAL_RANK": task,
            "WORLD_SIZE": tasks,
            "LOCAL_WORLD_SIZE": tasks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.environ["HERD_PORT"],
        }

    def requeue(self):
        if "HERD_QUEUE" not in self.environ:
            return "there is no queue"
        open(os.path.join(self.environ["HERD_QUEUE"], self.job), "x").close()

    def script(self, job):
        return f"""#!/bin/bash
export HERD_JOB=4711 HERD_TASKS={job.tasks_per_node} {' '.join(job.options)}
for task in $(seq 0 $((HERD_TASKS - 1))); do
    HERD_TASK=$task {job.program} train {shlex.join(job.arguments)} &
done
wait
"""

    def submit_command(self, job):
        return ["bash", str(job.folder / self.script_name)]

    def submitted(self, job, output):
        return f"job 4711 was run in {job.folder}"
'''
OTHER = "from distrib import Scheduler\nclass Other(Scheduler):\n    name = 'other'\n"


def install(folder: Path, package: str, text: str, entries: str) -> None:
    """A package as pip installs it: a module, and its metadata beside it."""
    (folder / f"{package}.py").write_text(text)
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[distrib.schedulers]\n{entries}\n")


@pytest.fixture
def path(mark: str, tmp_path: Path) -> str:
    """PYTHONPATH with the Herd installed."""
    (tmp_path / "installed").mkdir()
    install(tmp_path / "installed", "herd", HERD, "herd = herd:Herd")
    return f"{tmp_path / 'installed'}{os.pathsep}{environment(mark)['PYTHONPATH']}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config = {
        "name": "run",
        "task": {"target": "tasks:Slow"},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "train": {"steps": 3},
        "checkpoint": {"every_steps": 0},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_job_that_is_submitted_to_it(run: Run, path: str, config: Path, tmp_path: Path) -> None:
    command = ["distrib", "submit", config, "--scheduler", "herd", "--processes-per-node", 2]
    option = ["--option", f"HERD_PORT={free_port()}"]
    script = check(run(*command, *option, "--dry-run", PYTHONPATH=path))
    folder = tmp_path / "runs" / "run"
    assert f"-m distrib train {folder}/config.yaml --run-dir {folder} &" in script
    assert script.splitlines()[-1] == f"# bash {folder}/herd.sh"
    assert not folder.exists()
    assert check(run(*command, *option, PYTHONPATH=path)) == f"job 4711 was run in {folder}\n"
    (begun,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert (begun["launcher"], begun["job"], begun["hosts"]) == ("herd", "4711", ["cow0", "cow1"])
    assert steps_done(folder) == 3
    assert events(folder)[-1] == "finished"


@pytest.mark.parametrize("queue", ["there", "full", "none"])
def test_a_job_that_it_requeues(mark: str, path: str, config: Path, tmp_path: Path, queue: str) -> None:
    """The event says that the job is requeued if it is. Whether it is or not, the run is saved."""
    text = config.read_text().replace("steps: 3", "steps: 100000")
    config.write_text(text)
    folder, queued = tmp_path / "runs" / "run", tmp_path / "queue" / "8"
    (tmp_path / "queue").mkdir()
    env = {"PYTHONPATH": path, "HERD_JOB": "8", "HERD_TASKS": "2", "HERD_PORT": str(free_port())}
    if queue != "none":
        env["HERD_QUEUE"] = str(tmp_path / "queue")
    if queue == "full":
        queued.touch()
    tasks = [start(mark, tmp_path, "train", config, **env, HERD_TASK=task) for task in ("0", "1")]
    until(lambda: steps_done(folder) >= 3, "it does not begin")
    tasks[1].send_signal(signal.SIGUSR1)
    said = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [75, 75], said
    expected = {
        "there": "job 8 is requeued",
        "full": f"job 8 cannot be requeued (FileExistsError: [Errno 17] File exists: '{queued}'), submit it again",
        "none": "job 8 cannot be requeued (there is no queue), submit it again",
    }
    assert f"asked to stop; saved after step {steps_done(folder)}, {expected[queue]}" in said[0][0]
    last = lines(folder, "events.jsonl")[-1]
    assert (last["event"], last["requeue"]) == ("preempted", queue == "there")
    assert queued.exists() == (queue != "none")


def test_a_job_that_is_stopped_before_it_trains(mark: str, path: str, config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("tasks:Slow", f"tasks:Phased\n  folder: {tmp_path}")
    config.write_text(text)
    (tmp_path / "queue").mkdir()
    env = {"PYTHONPATH": path, "HERD_JOB": "8", "HERD_TASK": "0", "HERD_TASKS": "1", "HERD_PORT": "1"}
    task = start(mark, tmp_path, "train", config, **env, HERD_QUEUE=str(tmp_path / "queue"))
    until((tmp_path / "start-up").exists, "it does not begin")
    task.send_signal(signal.SIGUSR1)
    _, said = task.communicate(timeout=60)
    assert (task.returncode, said) == (75, "asked to stop while not training, nothing to save; job 8 is requeued\n")
    assert (tmp_path / "queue" / "8").exists()


def test_a_script_of_ones_own_that_it_starts(run: Run, path: str, tmp_path: Path) -> None:
    """No command of distrib's runs before it asks who it is."""
    (tmp_path / "mine.py").write_text(
        "from distrib import World\nworld = World.detect()\nprint(world.name, world.job)\n"
    )
    env = {"HERD_JOB": "8", "HERD_TASK": "1", "HERD_TASKS": "2", "HERD_PORT": "4000", "PYTHONPATH": path}
    assert check(run(sys.executable, "mine.py", **env)) == "rank 1 of 2 on cow1 8\n"


def test_two_that_both_started_the_process(run: Run, path: str, config: Path, tmp_path: Path) -> None:
    also = OTHER + "    @classmethod\n    def detect(cls, environ):\n        return 'HERD_JOB' in environ\n"
    install(tmp_path / "installed", "others", also, "other = others:Other")
    env = {"PYTHONPATH": path, "HERD_JOB": "8", "HERD_TASK": "0", "HERD_TASKS": "1", "HERD_PORT": "1"}
    line = refused(run("distrib", "train", config, **env))
    assert "herd (herd) and other (others) each find that they started this process" in line
    assert "set DISTRIB_SCHEDULER to herd or other" in line
    assert not (tmp_path / "runs").exists()
    for chosen, job in (("herd", "8"), ("other", None), ("none", None)):
        check(run("distrib", "train", config, "--run-dir", f"runs/{chosen}", **env, DISTRIB_SCHEDULER=chosen))
        (begun,) = json.loads((tmp_path / "runs" / chosen / "environment.json").read_text())["starts"]
        assert begun["job"] == job


def test_one_that_is_not_there(run: Run, path: str, config: Path, tmp_path: Path) -> None:
    line = refused(run("distrib", "train", config, DISTRIB_SCHEDULER="pbs", PYTHONPATH=path))
    assert line.startswith(
        "error: DISTRIB_SCHEDULER=pbs: there is no such scheduler; give one of herd, kubernetes, slurm"
    )
    line = refused(run("distrib", "submit", config, "--scheduler", "pbs"))
    assert line.startswith("error: --scheduler: pbs: there is no such scheduler; give one of kubernetes, slurm")
    assert not (tmp_path / "runs").exists()


def test_one_that_takes_no_jobs(run: Run, config: Path, tmp_path: Path) -> None:
    line = refused(run("distrib", "submit", config, "--scheduler", "kubernetes"))
    assert line.startswith("error: --scheduler: kubernetes takes no jobs from `distrib submit`; give one of slurm, or")
    assert not (tmp_path / "runs").exists()


def test_several_that_take_jobs(run: Run, path: str, config: Path) -> None:
    line = refused(run("distrib", "submit", config, PYTHONPATH=path))
    assert line == "error: --scheduler: slurm and herd take jobs; give one of them, or set DISTRIB_SCHEDULER"
    result = run("distrib", "submit", config, "--dry-run", PYTHONPATH=path, DISTRIB_SCHEDULER="slurm")
    assert check(result).splitlines()[-1].startswith("# sbatch --parsable ")


@pytest.mark.parametrize(
    ("text", "entries", "said"),
    [
        ("import nothing_of_this_name\n", "other = others:Other", "cannot be loaded: ModuleNotFoundError: No module"),
        ("1 / 0\n", "other = others:Other", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("", "other = others:Other", "cannot be loaded: AttributeError"),
        ("", "other = others", "cannot be loaded"),
        ("Other = dict\n", "other = others:Other", "is no class that derives from Scheduler"),
        (OTHER, "other = others:Other", "has no detect"),
        (HERD, "cattle = others:Herd", "has the name 'herd', its entry point 'cattle'"),
    ],
)
def test_one_that_cannot_be_used(
    run: Run, path: str, config: Path, tmp_path: Path, text: str, entries: str, said: str
) -> None:
    """It is not passed over: where it has started several tasks, each would train alone."""
    install(tmp_path / "installed", "others", text, entries)
    line = refused(run("distrib", "train", config, PYTHONPATH=path))
    name, _, target = entries.partition(" = ")
    assert line.startswith(f"error: the scheduler {name} of others ({target}) {said}")
    assert line.endswith("; mend or uninstall others, or set DISTRIB_SCHEDULER to another or to none")
    check(run("distrib", "submit", config, "--dry-run", PYTHONPATH=path, DISTRIB_SCHEDULER="slurm"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{OTHER}    @classmethod\n    def detect(cls, environ): return environ['NOPE']\n", "KeyError: 'NOPE'"),
        (f"{OTHER}    def detect(self, environ): return True\n", "TypeError: Other.detect() missing 1 required"),
    ],
)
def test_a_detect_that_fails(run: Run, path: str, config: Path, tmp_path: Path, text: str, said: str) -> None:
    install(tmp_path / "installed", "others", text, "other = others:Other")
    line = refused(run("distrib", "train", config, PYTHONPATH=path))
    assert line.startswith(f"error: the scheduler other (others): detect failed: {said}")
    assert line.endswith("; mend it, or set DISTRIB_SCHEDULER to another or to none")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("herd = others:Herd", "herd and others both bring herd to distrib.schedulers"),
        ("slurm = others:Slurm", "distrib and others both bring slurm to distrib.schedulers"),
        ("torchrun = others:Torchrun", "others brings torchrun to distrib.schedulers, a name that is"),
        ("none = others:Nothing", "others brings none to distrib.schedulers, a name that is taken"),
    ],
)
def test_names_that_are_taken(run: Run, path: str, config: Path, tmp_path: Path, entry: str, said: str) -> None:
    install(tmp_path / "installed", "others", HERD, entry)
    assert said in refused(run("distrib", "train", config, PYTHONPATH=path))


def test_distribs_own_are_found_with_their_entry_points_too(run: Run, path: str, config: Path, tmp_path: Path) -> None:
    """As pip installs them; without metadata the others here find them."""
    own = "\n".join(f"{name} = {target}" for name, target in OWN[SCHEDULERS].items())
    install(tmp_path / "installed", "again", "", own)
    check(run("distrib", "submit", config, "--dry-run", "--scheduler", "slurm", PYTHONPATH=path))


def test_schedulers_need_no_torch(path: str, mark: str, tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom distrib.processes.schedulers.registry import detect\n"
        "print(type(detect(os.environ)).__name__, 'torch' in sys.modules)"
    )
    env = environment(mark, PYTHONPATH=path, HERD_JOB="8")
    result = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert check(result) == "Herd False\n"
    assert not processes_of(mark)


def test_pyproject_names_the_built_in_ones() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["distrib.schedulers"] == OWN[SCHEDULERS]
