"""Jobs on a real cluster of two nodes: they train, are stopped in every way, and go on as if nothing had happened."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, missing, running_cluster
from conftest import ROOT, check_same, events, lines, no_process_left, steps_done, until

from distrib.processes.schedulers.slurm import first_host
from distrib.run_folder.folder import RunDir

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(400), pytest.mark.slow]

STEPS = 500
CONFIG = {
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4, "num_workers": 1},
    "train": {"steps": STEPS},
    "eval": {"every_steps": 100},
    "checkpoint": {"every_steps": 50},
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"no SLURM cluster: {why}; run as root after apt-get install slurm-wlm munge, as .ci/run does")
    with no_process_left() as mark, running_cluster(tmp_path_factory.mktemp("slurm"), mark) as cluster:
        yield cluster


def write(folder: Path, **changes: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def submitted(slurm: Cluster, folder: Path, *arguments: object) -> str:
    """The job's number."""
    said = slurm.command("distrib", "submit", "run.yaml", *arguments, cwd=folder)
    found = re.fullmatch(r"job (\d+), its log: (.*)", said)
    assert found is not None, said
    return found[1]


def ended(slurm: Cluster, job: str) -> str:
    """How, after waiting for it."""
    until(lambda: slurm.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), f"{job} does not end", 180)
    return slurm.job(job)["JobState"]


def start_again(slurm: Cluster, job: str) -> None:
    """Sooner than the two minutes after which SLURM does; not in the second in which the job was requeued, or the nodes
    refuse it, because they take its new credential for the one that was revoked (seen in CI, once in a few)."""
    slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def answering_late(slurm: Cluster, folder: Path) -> Cluster:
    """The same cluster, whose scontrol has its answer only after SLURM has sent SIGTERM to the job, and so to it."""
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\n{shutil.which("scontrol")} "$@"\ncode=$?\nsleep 2\nexit $code\n')
    scontrol.chmod(0o755)
    return replace(slurm, environment={**slurm.environment, "PATH": f"{scontrol.parent}:{slurm.environment['PATH']}"})


def log(folder: Path, job: str) -> str:
    return (folder / "runs" / "run" / f"slurm-{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that a job on two nodes makes when nobody stops it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder)
    job = submitted(slurm, folder, "--nodes", 2, "--time", "10:00")
    assert ended(slurm, job) == "COMPLETED", log(folder, job)
    return folder / "runs" / "run"


def test_a_job_on_two_nodes_trains_and_evaluates(slurm: Cluster, undisturbed: Path) -> None:
    (start,) = json.loads((undisturbed / "environment.json").read_text())["starts"]
    assert (start["launcher"], start["world_size"], start["hosts"]) == ("slurm", 2, ["n1", "n2"])
    assert start["job"].isdecimal()
    assert steps_done(undisturbed) == STEPS
    assert [line["step"] for line in lines(undisturbed, "evals.jsonl")] == [100, 200, 300, 400, 500]
    assert events(undisturbed)[-1] == "finished"


@pytest.mark.parametrize("seed", [1])
def test_a_job_that_is_stopped_five_times(slurm: Cluster, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """By USR1, by requeue, by cancel and requeue, at random moments; in the order that chance gives."""
    write(tmp_path)
    run, chance = tmp_path / "runs" / "run", random.Random(seed)
    job = submitted(answering_late(slurm, tmp_path), tmp_path, "--nodes", 2, "--time", "10:00")
    ways = ["usr1", "usr1", "requeue", "requeue", "cancel"]
    chance.shuffle(ways)
    for start, way in enumerate(ways, 1):
        begun = steps_done(run)
        wanted = begun + chance.randint(5, (STEPS - 20) // 7)
        until(lambda wanted=wanted: steps_done(run) >= wanted, f"it does not come to {wanted}", 120)  # type: ignore[misc]
        if way == "usr1":
            slurm.command("scancel", "--signal=USR1", job)
        elif way == "requeue":
            slurm.command("scontrol", "requeue", job)
        else:
            slurm.command("scancel", job)
            assert ended(slurm, job) == "CANCELLED"
            slurm.command("scontrol", "requeue", job)
        until(lambda: slurm.job(job)["JobState"] == "PENDING", f"{way}: not requeued", 60)
        assert slurm.job(job)["Restarts"] == str(start), way
        start_again(slurm, job)
    assert ended(slurm, job) == "COMPLETED", log(tmp_path, job)
    check_same(run, undisturbed)
    said = log(tmp_path, job)
    assert said.count(f"job {job} is requeued") == 2
    assert said.count("going on after step") == 5
    requeued = [event["requeue"] for event in lines(run, "events.jsonl") if event["event"] == "preempted"]
    assert requeued.count(True) == 2
    assert json.loads((run / "summary.json").read_text())["restarts"] == 5


def test_jobs_whose_time_is_over(slurm: Cluster, tmp_path: Path) -> None:
    """SLURM sends USR1 some time before (it counts in minutes), the job saves and is requeued.

    Once with the template that lies in slurm/, as it is, on two nodes; once as the last task of an array, whose number
    is that of the array: the others, done, failed, cancelled and running, are left alone."""
    config = write(tmp_path, train={"steps": 100_000}, checkpoint={"every_steps": 0})
    run = tmp_path / "runs" / "run"
    options = ["--parsable", "--signal=USR1@30"]
    done, failed, others = "train.steps=3", "task.target=tasks:Nowhere", "seed=1\n" * 3
    (tmp_path / "five.txt").write_text(f"{done}\n{failed}\n{others}")
    tasks = [tmp_path / "runs" / "five" / str(number) for number in range(5)]
    sweep = ROOT / "slurm" / "sweep.sbatch"
    array = slurm.command("sbatch", *options, "--time=60", "--array=0-4", sweep, config, "five.txt", cwd=tmp_path)
    until(lambda: all(steps_done(tasks[number]) for number in (2, 3, 4)), "they do not begin", 120)
    slurm.command("scancel", f"{array}_2")
    _, minutes, _ = slurm.job(f"{array}_4")["RunTime"].split(":")
    slurm.command("scontrol", "update", f"JobId={array}_4", f"TimeLimit={int(minutes) + 2}")
    out = f"--output={tmp_path}/out"
    template = ROOT / "slurm" / "train.sbatch"
    job = slurm.command("sbatch", *options, "--time=2", "--nodes=2", out, template, config, cwd=tmp_path)
    until(lambda: slurm.job(job)["JobState"] == "RUNNING", "it does not begin")
    for name in (job, f"{array}_4"):
        until(lambda name=name: slurm.job(name)["Restarts"] == "1", "its time is not over", 180)  # type: ignore[misc]
    slurm.command("scancel", job)
    said = (tmp_path / "out").read_text()
    assert f"runs/run: asked to stop; saved after step {steps_done(run)}, job {job} is requeued" in said
    assert events(run) == ["started", "checkpoint", "preempted"]

    said = (tmp_path / f"slurm-{array}_4.log").read_text()
    assert f"asked to stop; saved after step {steps_done(tasks[4])}, job {array}_4 is requeued" in said
    until(lambda: slurm.job(f"{array}_4")["JobState"] == "PENDING", "it does not go back into the queue")
    states = {number: slurm.job(f"{array}_{number}") for number in range(5)}
    slurm.command("scancel", array)
    assert {number: (state["JobState"], state["Restarts"]) for number, state in states.items()} == {
        0: ("COMPLETED", "0"),
        1: ("FAILED", "0"),
        2: ("CANCELLED", "0"),
        3: ("RUNNING", "0"),
        4: ("PENDING", "1"),
    }
    assert states[4]["JobId"] == array
    assert json.loads((tasks[4] / "environment.json").read_text())["starts"][0]["job"] == f"{array}_4"


def test_a_job_that_is_stopped_while_it_starts(slurm: Cluster, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Phased", "folder": str(tmp_path)}, train={"steps": 5})
    job = submitted(slurm, tmp_path, "--nodes", 2)
    until((tmp_path / "start-up").exists, "it does not begin")
    slurm.command("scancel", "--signal=USR1", job)
    until(lambda: slurm.job(job)["JobState"] == "PENDING", "it is not requeued")
    said = f"asked to stop while not training, nothing to save; job {job} is requeued"
    until(lambda: said in log(tmp_path, job), "it does not say so")  # printed when SLURM has answered
    start_again(slurm, job)
    assert ended(slurm, job) == "COMPLETED", log(tmp_path, job)
    assert slurm.job(job)["Restarts"] == "1"
    assert steps_done(tmp_path / "runs" / "run") == 5


def test_a_job_that_fails_by_itself_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Misbehaving", "how": "raise", "on_rank": 1})
    job = submitted(slurm, tmp_path, "--nodes", 2)
    assert ended(slurm, job) == "FAILED"
    assert slurm.job(job)["Restarts"] == "0"
    said = log(tmp_path, job)
    assert said.count("ZeroDivisionError: the task divided by zero") == 1
    assert "rank 1 of 2 on n2 failed:" in said


def test_a_task_that_is_killed(slurm: Cluster, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Misbehaving", "how": "kill", "on_rank": 1})
    job = submitted(slurm, tmp_path, "--nodes", 2)
    assert ended(slurm, job) == "FAILED"
    assert slurm.job(job)["Restarts"] == "0"
    assert "task 1: Killed" in log(tmp_path, job)


def test_a_config_that_is_wrong_for_the_task(slurm: Cluster, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Nowhere"})
    job = submitted(slurm, tmp_path, "--nodes", 2)
    assert ended(slurm, job) == "FAILED"
    # srun says the highest of the tasks' codes; one that is still starting when the first ends is ended by SIGTERM
    assert slurm.job(job)["ExitCode"] in ("2:0", "143:0")
    assert slurm.job(job)["Restarts"] == "0"
    assert log(tmp_path, job).count("error: task.target: module 'tasks' has no 'Nowhere'") == 1


def test_an_array_of_two_runs(slurm: Cluster, tmp_path: Path) -> None:
    """slurm/sweep.sbatch, one line of overrides for each."""
    config = write(tmp_path, train={"steps": 5})
    (tmp_path / "rates.txt").write_text("optim.lr=0.01 seed=1\noptim.lr=0.1 seed=2\n")
    sweep = ROOT / "slurm" / "sweep.sbatch"
    job = slurm.command("sbatch", "--parsable", "--array=0-2", sweep, config, "rates.txt", cwd=tmp_path)
    runs = [tmp_path / "runs" / "rates" / str(number) for number in (0, 1)]
    until(lambda: all((run / "summary.json").exists() for run in runs), "they do not end", 120)
    for number, (run, rate) in enumerate(zip(runs, (0.01, 0.1), strict=True)):
        assert RunDir(run).read_config().optim.lr == rate
        assert RunDir(run).read_config().tracking.group == "rates"
        assert (tmp_path / f"slurm-{job}_{number}.log").exists()
    left_over = tmp_path / f"slurm-{job}_2.log"
    until(lambda: left_over.exists() and left_over.read_text(), "there is no third task")
    assert "task 2 of the array has no line in rates.txt" in left_over.read_text()
    assert not (tmp_path / "runs" / "rates" / "2").exists()


def test_submitting_what_was_submitted_before(slurm: Cluster, tmp_path: Path) -> None:
    """Edits to the config after submission do not reach the job; another config is refused, nothing is lost."""
    slurm.command("scontrol", "update", "NodeName=n1,n2", "State=DRAIN", "Reason=test")
    try:
        write(tmp_path, train={"steps": 3})
        job = submitted(slurm, tmp_path)
        write(tmp_path, train={"steps": 4})
        with pytest.raises(AssertionError, match=r"train\.steps was 3, is 4"):
            submitted(slurm, tmp_path)
        with pytest.raises(AssertionError, match=r"sbatch refused the job: .*[Ii]nvalid partition"):
            submitted(slurm, tmp_path, "--run-dir", "other", "--slurm", "partition=nowhere")
        assert not (tmp_path / "other").exists()
    finally:
        slurm.command("scontrol", "update", "NodeName=n1,n2", "State=RESUME")
    assert ended(slurm, job) == "COMPLETED"
    assert steps_done(tmp_path / "runs" / "run") == 3


def test_the_first_host_is_the_one_that_slurm_says(slurm: Cluster) -> None:
    for nodelist in ("n[1-2]", "n1,m[003-005,7]", "a[1-2]b[3-4],c", "gpu-a[09-11],gpu-b2"):
        assert first_host(nodelist) == slurm.command("scontrol", "show", "hostnames", nodelist).split()[0]


def test_two_processes_on_each_node(slurm: Cluster, tmp_path: Path) -> None:
    write(tmp_path, train={"steps": 5})
    job = submitted(slurm, tmp_path, "--nodes", 2, "--processes-per-node", 2)
    assert ended(slurm, job) == "COMPLETED", log(tmp_path, job)
    assert {line["world_size"] for line in lines(tmp_path / "runs" / "run")} == {4}
