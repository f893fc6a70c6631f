"""Wrong input: one line, exit code 2, nothing started. A crash: all processes end, and the failed rank is named."""

import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import tasks
import yaml
from conftest import Run, check, refused

from distrib import Config, Trainer
from distrib.errors import ConfigError
from distrib.task import load_task

CONFIG = {
    "task": {"target": "tasks:Masked"},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 30},
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2", "small.yaml", "data.num_wokers=1"], "did you mean data.num_workers?"),
        (["--processes", "2", "nowhere.yaml"], "nowhere.yaml: cannot read the config"),
        (["--processes", "128", "small.yaml"], "4 micro-batches (16 / 4), which 128 processes cannot share"),
        (["--processes", "0", "small.yaml"], "--processes: 0, give 1 or more"),
        (["--processes", "2", "nowhere.py"], "nowhere.py: there is no such script"),
    ],
)
def test_errors_that_the_launcher_refuses(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    write(tmp_path)
    assert said in refused(run("distrib", "launch", *arguments))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.global_batch_size=128", "global_batch_size: 128, but the training set has only 97 samples"),
        ("task.target=tasks:Maskd", "module 'tasks' has no 'Maskd', did you mean tasks:Masked?"),
        ("task.target=tasks:NoLength", "task.train_dataset: returned list_iterator; return a Dataset"),
        ("task.samples=0", "task.eval_dataset: it has no samples"),
        ("task={target: 'distrib.tasks.digits:Digits', network: rnn}", "task.network: 'rnn'; give cnn or mlp"),
        ("optim.name=adamx", "optim.name: 'adamx'"),
        ("optim.momentum=0.9", "optim.momentum: AdamW has no momentum"),
        ("optim.options.alpha=1", "optim.options.alpha: not an option of AdamW"),
    ],
)
def test_errors_are_refused_before_the_processes_join(tmp_path: Path, override: str, said: str) -> None:
    config = Config.load(write(tmp_path), [override])
    with pytest.raises(ConfigError, match=re.escape(said)):
        Trainer(load_task(config.task), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_error_of_all_ranks_is_printed_once(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    line = refused(run("distrib", "launch", "--processes", 2, "small.yaml", "data.global_batch_size=128"))
    assert "the training set has only 97 samples" in line
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "precious.txt").write_text("x")
    line = refused(run("distrib", "launch", "--processes", 2, "small.yaml"))
    assert "the folder holds other files" in line
    assert os.listdir(tmp_path / "runs" / "small") == ["precious.txt"]


def test_a_taken_port_is_refused(run: Run, tmp_path: Path) -> None:
    config = write(tmp_path)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(run("distrib", "launch", "--processes", 2, "--port", port, config))
        assert f"--port: port {port} cannot be used: Address already in use" in line
        plain = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        result = run("distrib", "train", config, **plain)
        assert result.returncode == 2
        assert f"rendezvous at 127.0.0.1:{port} failed" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_usage_error_has_no_traceback(run: Run) -> None:
    result = run("distrib", "train")
    assert result.returncode == 2
    assert "missing argument" in result.stderr
    assert "Traceback" not in result.stderr


def misbehave(how: str, on_rank: int) -> dict[str, object]:
    return {"target": "tasks:Misbehaving", "how": how, "on_rank": on_rank}


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_rank_that_raises_is_named_and_ends_all(run: Run, tmp_path: Path, on_rank: int) -> None:
    result = run("distrib", "launch", "--processes", 2, write(tmp_path, task=misbehave("raise", on_rank)))
    check(result, code=1)
    assert f"rank {on_rank} of 2 on {socket.gethostname()} failed:" in result.stderr
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.count("ZeroDivisionError: the task divided by zero") == 1
    assert re.findall(r'File "(.*)", line', result.stderr) == [tasks.__file__]
    assert f"distrib launch: rank {on_rank} failed with exit code 1" in result.stderr
    events = (tmp_path / "runs" / "small" / "events.jsonl").read_text()
    event = json.loads(events.splitlines()[-1])
    expected = "ZeroDivisionError: the task divided by zero"
    if on_rank:
        expected = f"rank 0 stopped, because rank 1 of 2 on {socket.gethostname()} had failed"
    assert (event["event"], event["error"]) == ("failed", expected)


def test_torchrun_prints_the_traceback_once(run: Run, tmp_path: Path) -> None:
    train = ["-m", "distrib", "train", write(tmp_path, task=misbehave("raise", 1))]
    result = run(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, *train)
    assert result.returncode == 1
    assert result.stderr.count("ZeroDivisionError: the task divided by zero") == 1
    assert result.stderr.count("rank 1 of 2") >= 1


def test_a_rank_that_is_killed_ends_all(run: Run, tmp_path: Path) -> None:
    result = run("distrib", "launch", "--processes", 3, write(tmp_path, task=misbehave("kill", 1), **THREE))
    check(result, code=1)
    assert "distrib launch: rank 1 was ended by SIGKILL" in result.stderr
    assert "Traceback" not in result.stderr
    event = json.loads((tmp_path / "runs" / "small" / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "failed"
    assert f"rank 0 stopped: it lost contact with rank 1 of 3 on {socket.gethostname()}" in event["error"]


THREE = {"data": {"global_batch_size": 12, "micro_batch_size": 4, "num_workers": 1}}


def test_an_error_in_a_worker_is_shown(run: Run, tmp_path: Path) -> None:
    data = {**CONFIG["data"], "num_workers": 1}  # type: ignore[dict-item]
    task = {"target": "tasks:BrokenData"}
    result = run("distrib", "launch", "--processes", 2, write(tmp_path, task=task, data=data))
    check(result, code=1)
    assert result.stderr.count("ValueError: sample 40 is broken") == 1


def test_names_of_sums_that_differ_between_ranks(run: Run, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:OtherSums"})
    line = refused(run("distrib", "launch", "--processes", 2, "small.yaml"))
    assert line == (
        "error: task.loss: the names of the Loss's sums are on-1 on rank 1, but on rank 0 on-0; give the same names "
        "each time, with (0, 0) where there is nothing to count"
    )
