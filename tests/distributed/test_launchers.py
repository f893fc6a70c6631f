"""The real launchers, each of which starts two processes. Silent fallbacks are refused."""

import json
import sys
from pathlib import Path

import pytest
import warm
import yaml
from conftest import BIN, ROOT, Run, check, environment, free_port, lines, no_process_left, refused

CONFIG = {
    "task": {"target": "tasks:Masked", "dropout": 0.2},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 5},
}
LAUNCH = ROOT / "launch"
DDP = LAUNCH / "ddp.yaml"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]  # as the command does


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def commands(config: Path) -> dict[str, list[object]]:
    port = free_port()
    train = ["-m", "distrib", "train", config]
    return {
        "distrib": ["distrib", "launch", "--verbose", config, "--processes", 2, "--resume", "auto", "--port", port],
        "torchrun": [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", port, *train],
        "accelerate": [BIN / "accelerate", "launch", "--config_file", DDP, "--main_process_port", port, *train],
    }


@pytest.mark.parametrize("launcher", ["distrib", "torchrun", "accelerate"])
def test_each_launcher_starts_two_ranks(run: Run, config: Path, tmp_path: Path, launcher: str) -> None:
    check(run(*commands(config)[launcher]))
    run_dir = tmp_path / "runs" / "small"
    (start,) = json.loads((run_dir / "environment.json").read_text())["starts"]
    assert (start["launcher"], start["world_size"], start["strategy"]) == (launcher, 2, "ddp")
    assert {line["world_size"] for line in lines(run_dir)} == {2}


def test_a_script_may_end_with_running_threads(run: Run, tmp_path: Path) -> None:
    """Threads of a pool would wait for ever, unless they learn that the program ends; other threads are joined."""
    (tmp_path / "script.py").write_text(
        "import threading, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(1)\n"
        "pool.submit(print, 'pool')\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('late'))).start()\n"
    )
    assert sorted(check(run("distrib", "launch", "--processes", 1, "script.py")).split()) == ["late", "pool"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cpu", "--num_processes", 2],
        ["--config_file", "multi_cpu.yaml"],
        ["--config_file", DDP, "--cpu"],
    ],
    ids=["--cpu", "MULTI_CPU", "ddp.yaml with --cpu"],
)
def test_accelerate_starting_one_process_instead_of_two_is_refused(
    run: Run, config: Path, tmp_path: Path, arguments: list[object]
) -> None:
    multi_cpu = {**yaml.safe_load(DDP.read_text()), "distributed_type": "MULTI_CPU", "use_cpu": True}
    (tmp_path / "multi_cpu.yaml").write_text(yaml.safe_dump(multi_cpu))
    result = run(*ACCELERATE, *arguments, "-m", "distrib", "train", config)
    assert result.returncode != 0
    assert result.stderr.count("error: accelerate launch was asked for several processes but started one") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--use_fsdp"], "accelerate launch was told to use fsdp1, which distrib does not run"),
        (["--mixed_precision", "bf16"], "told train.mixed_precision: bf16, the config makes it no"),
        (["--dynamo_backend", "inductor"], "told train.compile: model, the config makes it false"),
    ],
    ids=["fsdp1", "bf16", "dynamo"],
)
def test_a_strategy_or_precision_that_contradicts_accelerate_is_refused(
    run: Run, config: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    command = [*ACCELERATE, "--config_file", DDP, "--main_process_port", free_port()]
    result = run(*command, *arguments, "-m", "distrib", "train", config)
    assert result.returncode != 0
    assert result.stderr.count(said) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_strategy_auto_follows_accelerates_config_file(run: Run, config: Path, tmp_path: Path, strategy: str) -> None:
    file = LAUNCH / f"{strategy}.yaml"
    command = [*ACCELERATE, "--config_file", file, "--main_process_port", free_port()]
    check(run(*command, "-m", "distrib", "train", config))
    assert {(line["world_size"], line["strategy"]) for line in lines(tmp_path / "runs" / "small")} == {(2, strategy)}


def test_a_config_that_contradicts_accelerates_file_is_refused(run: Run, config: Path, tmp_path: Path) -> None:
    command = [*ACCELERATE, "--config_file", LAUNCH / "zero2.yaml", "--main_process_port", free_port()]
    result = run(*command, "-m", "distrib", "train", config, "strategy.name=fsdp2")
    assert result.returncode != 0
    assert result.stderr.count("told strategy.name: zero2, the config makes it fsdp2") == 1
    assert not (tmp_path / "runs").exists()


def test_accelerate_on_two_machines(config: Path, tmp_path: Path) -> None:
    """launch/multi-node.yaml, with this machine as both."""
    here = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--num_processes", "2"]
    command = [*ACCELERATE, "--config_file", LAUNCH / "multi-node.yaml", *here]
    with no_process_left() as mark:
        machines = []
        for rank in ("0", "1"):
            machine = [*command, "--machine_rank", rank, "-m", "distrib", "train", config]
            machines.append(warm.Popen(list(map(str, machine)), cwd=tmp_path, env=environment(mark)))
        assert [machine.wait(timeout=120) for machine in machines] == [0, 0]
    run_dir = tmp_path / "runs" / "small"
    assert {(line["world_size"], line["strategy"]) for line in lines(run_dir)} == {(2, "ddp")}
    assert len(lines(run_dir)) == 5


@pytest.mark.parametrize("script", ["test_script", "test_sync"])
def test_accelerates_test_scripts_pass_under_distrib_launch(run: Run, script: str) -> None:
    module = f"accelerate.test_utils.scripts.{script}"
    output = check(run("distrib", "launch", "--processes", 2, "-m", module))
    assert "Num processes: 2" in output if script == "test_script" else "Test `accumulate`" in output


def test_a_strategy_for_one_process_is_refused_for_two(run: Run, config: Path) -> None:
    line = refused(run("distrib", "launch", "--processes", 2, config, "strategy.name=single"))
    assert "strategy.name: single, but distrib started 2 processes" in line


def test_launch_of_a_script_with_arguments(run: Run, tmp_path: Path) -> None:
    """Also several runs in one script, and `Trainer` returning the same summary on every rank."""
    (tmp_path / "my_script.py").write_text(
        "import json, sys\n"
        "from distrib import Config, Trainer, World\n"
        "from tasks import Masked\n"
        "for name in sys.argv[1:]:\n"
        "    config = Config.from_dict({'name': name, 'train': {'steps': 3}})\n"
        "    summary = Trainer(Masked(), config).fit()\n"
        "    open(f'{name}-{World.detect().rank}.json', 'w').write(json.dumps(summary))\n"
    )
    check(run("distrib", "launch", "--processes", 2, "my_script.py", "first", "second"))
    for name in ("first", "second"):
        summaries = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert summaries[0] == summaries[1]
        assert summaries[0]["world_size"] == 2
        assert (tmp_path / "runs" / name / "summary.json").exists()


def test_launch_of_a_module_returns_its_exit_code(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(
        "import os, sys, time\n"
        "assert __name__ == '__main__'\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').close()\n"
        "while not os.path.exists(sys.argv[1] + '0'):\n"  # when one has failed the others are ended
        "    time.sleep(0.01)\n"
        "sys.exit(3 if os.environ['RANK'] == '1' else 0)\n"
    )
    (tmp_path / "temporary").mkdir()
    temporary = str(tmp_path / "temporary")
    result = run("distrib", "launch", "--processes", 2, "-m", "my_module", "was-here-", TMPDIR=temporary)
    check(result, code=1)
    assert list((tmp_path / "temporary").iterdir()) == []  # the launcher leaves nothing behind
    assert "rank 1 failed with exit code 3" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("was-here-*")) == ["was-here-0", "was-here-1"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-m", "nowhere"], "error: -m: there is no module 'nowhere', neither in {} nor installed"),
        (["-m", "package.nowhere"], "error: -m: there is no module 'package.nowhere', neither in {} nor installed"),
        (["-m", "package"], "error: -m: there is no module 'package.__main__', neither in {} nor installed"),
        (["-m", "runs.package"], "error: -m: there is no module 'runs.package', neither in {} nor installed"),
    ],
)
def test_a_missing_module_is_refused(run: Run, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    assert refused(run("distrib", "launch", "--processes", 1, *arguments)) == expected.format(tmp_path)


def test_a_syntax_error_in_a_script(run: Run, tmp_path: Path) -> None:
    """The message is Python's own, without distrib's frames."""
    (tmp_path / "script.py").write_text("import os\nprint(os\n")
    result = run("distrib", "launch", "--processes", 1, "script.py")
    check(result, code=1)
    said = result.stderr.splitlines()
    assert said[0].endswith(" failed:"), result.stderr
    assert said[1] == '  File "script.py", line 2'
    assert said[-2:] == [
        "SyntaxError: '(' was never closed",
        "distrib launch: rank 0 failed with exit code 1; all processes were ended",
    ]


def test_evaluate_and_restart_of_a_finished_run(run: Run, config: Path, tmp_path: Path) -> None:
    check(run("distrib", "launch", config))  # one process, where there is no accelerator
    run_dir = tmp_path / "runs" / "small"
    assert {(line["world_size"], line["strategy"]) for line in lines(run_dir)} == {(1, "single")}
    (evaluation,) = map(json.loads, (run_dir / "evals.jsonl").read_text().splitlines())
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    output = check(run("distrib", "evaluate", "runs/small", "--processes", 2, "--json"))
    assert json.loads(output) == {
        "checkpoint": "runs/small/checkpoints/step-00000005",
        "step": 5,
        "count": evaluation["count"],
        "metrics": pytest.approx(evaluation["metrics"], rel=1e-5),  # as everywhere, on another number of processes
    }
    assert "had finished before" in check(run("distrib", "train", config, "data.num_workers=1"))
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    line = refused(run("distrib", "train", config, "seed=1", "optim.lr=0.5"))
    assert "optim.lr was 0.001, is 0.5; seed was 0, is 1" in line
