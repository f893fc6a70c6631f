"""`distrib compare` finds what differs, where runs diverge and why: on real runs, and on generated numbers."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, check, no_process_left, refused, starter
from hypothesis import given
from hypothesis import strategies as st

from distrib import Config, Task, Trainer
from distrib.config import TaskConfig
from distrib.errors import ConfigError, RunDirError
from distrib.monitor.compare import tables
from distrib.monitor.compare.command import compare_runs
from distrib.monitor.compare.comparison import Divergence, compare, diverge, figures, relative_difference
from distrib.monitor.compare.runs import Curve, Digests, Run, load_runs
from distrib.task import load_task

pytestmark = [pytest.mark.xdist_group("comparison"), pytest.mark.slow]  # one process makes what they share

STEPS = 12
START = {"world_size": 1, "strategy": "single", "launcher": "plain"}
CONFIG = {
    "seed": 3,
    "task": {"target": "tasks:Masked", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": STEPS},
    "eval": {"every_steps": 4},
    "checkpoint": {"every_steps": 4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "again": {"checkpoint": {"every_steps": 0}, "data": {**CONFIG["data"], "prefetch_factor": 3}},  # type: ignore[dict-item]
    "rate": {"optim": {"lr": 0.01}},
    "seed": {"seed": 4},
    "batch": {"data": {"global_batch_size": 32, "micro_batch_size": 4}},
    "samples": {"task": {"target": "tasks:Masked", "dropout": 0.1, "samples": 60}},
    "longer": {"train": {"steps": STEPS + 4}},
    "cosine": {"optim": {"schedule": "cosine"}},
    "cosine-longer": {"optim": {"schedule": "cosine"}, "train": {"steps": STEPS + 4}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for each variant, in one process; `pair` in two processes; `edited` with a changed task file."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in VARIANTS.items():
        config = Config.from_dict(CONFIG | changes)
        assert isinstance(config.task, TaskConfig)
        Trainer(load_task(config.task), config, folder / name).fit()
    source = (ROOT / "tests" / "distributed" / "tasks.py").read_text()
    (folder / "smoothed.py").write_text(source.replace("ignore_index=-100", "ignore_index=-100, label_smoothing=0.1"))
    sys.path.append(str(folder))
    task: Task = importlib.import_module("smoothed").Masked(dropout=0.1)
    sys.path.pop()
    Trainer(task, Config.from_dict(CONFIG), folder / "edited").fit()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with no_process_left() as mark:
        run = starter(mark, folder)
        check(run("distrib", "launch", "--processes", 2, "config.yaml", "--run-dir", "pair"))
    (folder / "config.yaml").unlink()
    return folder


def divergence(runs: Path, name: str) -> Divergence:
    return diverge(*load_runs([runs / "base", runs / name]))


def test_the_same_run_again(runs: Path) -> None:
    found = divergence(runs, "again")
    assert (found.cause, found.because) == ("nothing", f"the same to the last bit over {STEPS} steps and 3 evaluations")
    assert (found.samples, found.loss, found.beyond_rounding, found.largest) == (None, None, None, 0)
    assert found.evaluation is None
    keys = {entry.key: entry.decides for entry in compare(load_runs([runs / "base", runs / "again"])).differences}
    assert keys == {"checkpoint.every_steps": False, "data.prefetch_factor": False}


def test_another_key_of_the_config(runs: Path) -> None:
    found = divergence(runs, "rate")
    assert (found.cause, found.because) == ("config", "optim.lr 0.001 → 0.01")
    assert (found.samples, found.loss) == (None, 1)  # the first loss is made before the first update


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("seed", "seed 3 → 4"),
        ("batch", "data.global_batch_size 16 → 32"),
        ("samples", "training_samples 97 → 60, task.samples null → 60"),
    ],
)
def test_another_data_order(runs: Path, name: str, because: str) -> None:
    found = divergence(runs, name)
    assert (found.cause, found.because, found.samples) == ("data order", because, 0)


def test_other_code(runs: Path) -> None:
    found = divergence(runs, "edited")
    assert found.cause == "code"
    assert re.fullmatch(r"task [0-9a-f]{12} → [0-9a-f]{12}", found.because)
    assert (found.samples, found.loss, found.beyond_rounding) == (None, 0, 0)


def test_another_world_size_alone(runs: Path) -> None:
    found = divergence(runs, "pair")
    assert found.cause == "numerics"
    assert "world_size 1 → 2" in found.because
    assert found.samples is None
    assert found.beyond_rounding is None
    assert 0 < found.largest <= found.rounding == 1e-5


def test_a_key_that_cannot_be_the_cause_is_not_named(runs: Path) -> None:
    """The run's length acts only through the schedule, which is constant here; the weight decay does act."""
    longer, base = (Run(**vars(run)) for run in load_runs([runs / "longer", runs / "base"]))
    assert diverge(base, longer).cause == "nothing"
    values = base.curves["train/loss"].values.copy()
    values[5] *= 1 + 1e-7
    nudged = dataclasses.replace(longer, curves=longer.curves | {"train/loss": Curve.of(range(1, STEPS + 1), values)})
    assert (diverge(base, nudged).cause, diverge(base, nudged).loss) == ("numerics", 5)
    decayed = dataclasses.replace(nudged, identity=nudged.identity | {"optim.weight_decay": 0.1})
    assert diverge(base, decayed).because == "optim.weight_decay 0.0 → 0.1"
    values[5] *= 2  # nothing that is recorded differs, and this is no rounding
    changed = dataclasses.replace(longer, curves=longer.curves | {"train/loss": Curve.of(range(1, STEPS + 1), values)})
    assert diverge(base, changed).cause == "not recorded"


def test_a_cause_that_shows_after_rounding_is_found(runs: Path) -> None:
    """On another number of processes the first losses differ in their last bits; later the other schedule shows."""
    first, longer = load_runs([runs / "cosine", runs / "cosine-longer"])
    values = longer.curves["train/loss"].values * (1 + 1e-7)
    pair = dataclasses.replace(
        longer,
        curves=longer.curves | {"train/loss": Curve.of(range(1, len(values) + 1), values)},
        machine=longer.machine | {"world_size": "2"},
    )
    found = diverge(first, pair)
    assert (found.cause, found.because) == ("config", f"train.steps {STEPS} → {STEPS + 4}; differing too: world_size")
    assert found.samples is None
    assert found.loss == 0
    assert found.beyond_rounding is not None
    assert found.beyond_rounding > 1


def test_evaluations_count_too(runs: Path) -> None:
    """The training is the same; one evaluated metric differs, or the loss by rounding, or by more."""
    base, again = load_runs([runs / "base", runs / "again"])

    def evaluated(**factors: float) -> Run:
        changed = {
            f"eval/{key}": Curve.of([4, 8, 12], base.curves[f"eval/{key}"].values * [1, 1, factor])
            for key, factor in factors.items()
        }
        machine = again.machine | {"world_size": "2"}
        return dataclasses.replace(again, curves=again.curves | changed, machine=machine)

    prefix = "evaluations part, not the training: "
    for factors, cause, because in (
        ({}, "nothing", f"the same to the last bit over {STEPS} steps and 3 evaluations"),
        ({"right": 2.0}, "not recorded", f"{prefix}more than rounding at once"),
        ({"loss": 1 + 1e-7, "right": 2.0}, "numerics", f"{prefix}world_size 1 → 2"),
        ({"loss": 1.03}, "not recorded", f"{prefix}more than rounding at once"),
    ):
        found = diverge(base, evaluated(**factors))
        assert (found.cause, found.evaluation) == (cause, 12 if factors else None)
        assert found.because.startswith(because)
    # running statistics: the losses of the steps differ by rounding alone, the evaluations by 3 %
    values = base.curves["train/loss"].values * (1 + 1e-7)
    rounded = {"train/loss": Curve.of(range(1, STEPS + 1), values)}
    pair = evaluated(loss=1.03)
    found = diverge(base, dataclasses.replace(pair, curves=pair.curves | rounded))
    assert (found.cause, found.beyond_rounding) == ("not recorded", None)
    pair = evaluated(loss=1 + 5e-7)
    assert diverge(base, dataclasses.replace(pair, curves=pair.curves | rounded)).cause == "numerics"


def test_other_samples_at_the_same_places(runs: Path, tmp_path: Path) -> None:
    """Fingerprints show it; older folders have none."""
    shutil.copytree(runs / "edited", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    environment = json.loads((tmp_path / "other" / "environment.json").read_text())
    samples = environment["data"]["train_dataset"]["samples"]
    samples["96"] = {**samples["96"], "exact": "another"}
    (tmp_path / "other" / "environment.json").write_text(json.dumps(environment))
    found = divergence(runs, str(tmp_path / "other"))
    assert (found.cause, found.beyond_rounding) == ("data", 0)
    assert found.because == "task.train_dataset has another sample 96 than in base; differing too: task"
    del environment["data"]
    (tmp_path / "other" / "environment.json").write_text(json.dumps(environment))
    assert divergence(runs, str(tmp_path / "other")).cause == "code"


def test_a_run_that_is_killed_or_goes_on(runs: Path, tmp_path: Path) -> None:
    """The last line is torn; the whole lines are compared."""
    torn = tmp_path / "torn"
    shutil.copytree(runs / "base", torn)
    (torn / "summary.json").unlink()
    for name in ("steps.jsonl", "evals.jsonl", "events.jsonl"):
        text = (torn / name).read_text()
        (torn / name).write_text(text[: len(text) - 20])
    comparison = compare(load_runs([runs / "base", torn]))
    assert comparison.divergences[0].because == f"the same to the last bit over {STEPS - 1} steps and 2 evaluations"
    assert [run.state for run in comparison.runs] == ["finished", "unfinished"]
    assert comparison.figures[1].steps == STEPS - 1
    (torn / "steps.jsonl").write_text("{torn}\n" + (runs / "base" / "steps.jsonl").read_text())
    comparison = compare(load_runs([runs / "base", torn]))
    assert comparison.divergences[0].because == f"the same to the last bit over {STEPS} steps and 2 evaluations"
    assert comparison.runs[1].trouble == (f"{torn / 'steps.jsonl'}: damaged: cannot read line 1",)


@pytest.mark.parametrize(
    ("event", "state"), [("failed", "failed"), ("preempted", "preempted"), ("started", "unfinished")]
)
def test_how_a_run_ended(runs: Path, tmp_path: Path, event: str, state: str) -> None:
    shutil.copytree(runs / "base", tmp_path / "ended")
    with (tmp_path / "ended" / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "error": "why", "step": 1, **START}) + "\n")
    assert load_runs([runs / "base", tmp_path / "ended"])[1].state == state


def test_a_run_that_trains_now(runs: Path, tmp_path: Path) -> None:
    """Another process holds the lock, as `distrib train` does."""
    shutil.copytree(runs / "base", tmp_path / "now")
    (tmp_path / "now" / "events.jsonl").write_text(json.dumps({"event": "started", **START}) + "\n")
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "now" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert load_runs([runs / "base", tmp_path / "now"])[1].state == "running"
        process.communicate("\n")
    assert load_runs([runs / "base", tmp_path / "now"])[1].state == "unfinished"


def test_a_run_that_has_not_begun(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "queued").mkdir()
    shutil.copy(runs / "base" / "config.yaml", tmp_path / "queued")
    comparison = compare(load_runs([runs / "base", tmp_path / "queued"]))
    assert comparison.runs[1].state == "not begun"
    assert comparison.figures[1].final == {}
    assert comparison.divergences[0].because == "no step has a loss in both"


def test_each_start_counts(runs: Path, tmp_path: Path) -> None:
    """A run was resumed in two processes, and then with other code."""
    again = tmp_path / "again"
    shutil.copytree(runs / "base", again)
    environment = json.loads((again / "environment.json").read_text())
    start = environment["starts"][0]
    edited = start["code"] | {"uncommitted": "0123456789abcdef"}
    environment["starts"] += [start | {"world_size": 2}, start | {"world_size": 2, "code": edited}]
    (again / "environment.json").write_text(json.dumps(environment))
    comparison = compare(load_runs([runs / "base", again]))
    found = {entry.key: entry.values[1] for entry in comparison.differences}
    assert found["world_size"] == "1, then 2"
    assert found["uncommitted"].endswith(", then 0123456789ab")
    assert comparison.runs[1].restarts == 2


def test_figures(runs: Path) -> None:
    (found, _) = compare(load_runs([runs / "base", runs / "rate"])).figures
    summary = json.loads((runs / "base" / "summary.json").read_text())
    assert found.final == {"train/loss": summary["metrics"]["train/loss"], **summary["metrics"]}
    evals = [json.loads(line) for line in (runs / "base" / "evals.jsonl").read_text().splitlines()]
    of_loss = [(entry["metrics"]["eval/loss"], entry["step"]) for entry in evals]
    of_right = [(entry["metrics"]["eval/right"], -entry["step"]) for entry in evals]
    assert found.best == {"eval/loss": min(of_loss), "eval/right": (max(of_right)[0], -max(of_right)[1])}
    seconds = [json.loads(line)["seconds"] for line in (runs / "base" / "steps.jsonl").read_text().splitlines()]
    assert found.seconds == pytest.approx(sum(seconds))
    assert found.samples_per_second == pytest.approx(16 * (STEPS - 1) / sum(seconds[1:]))


def test_the_command(runs: Path, tmp_path: Path) -> None:
    with no_process_left() as mark:
        run = starter(mark, tmp_path)
        said = check(run("distrib", "compare", *(runs / name for name in VARIANTS), "--out", "out/all.html"))
        one = refused(run("distrib", "compare", runs / "base"))
    for expected in ("optim.lr 0.001 → 0.01", "seed 3 → 4", "eval/right", "optim.lr *", "0.01: rate"):
        assert expected in said
    assert "give two runs or more" in one
    assert (tmp_path / "out" / "all.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "out" / "all.png").read_bytes().startswith(b"\x89PNG")


def test_fifty_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(50):
        folder = tmp_path / f"run-{number:02}"
        shutil.copytree(runs / "base", folder, ignore=shutil.ignore_patterns("checkpoints"))
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("lr: 0.001", f"lr: {0.001 + number / 1e4:.4f}"))
    compare_runs(sorted(tmp_path.glob("run-*")), tmp_path / "fifty.html")
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 50 + 49 + 30  # a row a run in two tables, and a few keys
    assert "and 44 more" in said


@pytest.mark.parametrize(
    ("given_paths", "message"),
    [
        (["base"], "give two runs or more"),
        (["base", "base"], "each once"),
        (["base", "nowhere"], "nowhere: no such folder"),
        (["base", "base/checkpoints"], "checkpoints: not a run"),
    ],
)
def test_refusals(runs: Path, given_paths: list[str], message: str) -> None:
    with pytest.raises(RunDirError, match=message):
        load_runs([runs / path for path in given_paths])


def test_out_is_a_page(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*all\.png: the page is an \.html file"):
        compare_runs([runs / "base", runs / "rate"], tmp_path / "all.png")
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="cannot be written"):
        compare_runs([runs / "base", runs / "rate"], tmp_path / "file" / "all.html")


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "rate", tmp_path / "base")
    names = [run.name for run in load_runs([runs / "base", tmp_path / "base", runs / "rate"])]
    assert names == [str(runs / "base"), str(tmp_path / "base"), "rate"]


losses = st.lists(st.floats(width=32, allow_infinity=False) | st.just(math.nan), min_size=1, max_size=20)


def made_up(values: list[float], samples: list[int], **facts: Any) -> Run:
    steps = range(1, len(values) + 1)
    clock = Curve.of(steps, [float(step) for step in steps])
    curves = {"train/loss": Curve.of(steps, values)}
    digests = Digests.of(range(1, len(samples) + 1), [str(value) for value in samples])
    empty: Callable[[str], dict[str, Any]] = lambda key: facts.get(key, {})  # noqa: E731
    return Run("made up", "finished", {}, empty("function"), empty("code"), empty("machine"), 0, curves, clock, digests)


@given(losses, losses, st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_the_first_step_that_differs(
    ours: list[float], theirs: list[float], ordered: list[int], otherwise: list[int]
) -> None:
    """The result equals that of a plain search."""
    found = diverge(made_up(ours, ordered), made_up(theirs, otherwise))
    pairs = list(zip(ours, theirs, strict=False))
    unlike = [step for step, (a, b) in enumerate(pairs) if a != b and not (math.isnan(a) and math.isnan(b))]
    assert found.steps == len(pairs)
    assert found.loss == (unlike[0] if unlike else None)
    misread = [step for step, (a, b) in enumerate(zip(ordered, otherwise, strict=False)) if a != b]
    assert found.samples == (misread[0] if misread else None)
    if found.beyond_rounding is not None:
        assert found.loss is not None
        assert found.beyond_rounding >= found.loss
    if not unlike and not misread:
        assert found.cause == "nothing"
    elif misread and (found.beyond_rounding is None or misread[0] <= found.beyond_rounding):
        assert found.cause == "data order"
    else:
        assert found.cause in ("numerics", "not recorded")
        assert (found.cause == "numerics") == (found.beyond_rounding != found.loss)


@given(st.floats(width=32), st.floats(width=32))
def test_relative_difference(a: float, b: float) -> None:
    ours, theirs = Curve.of([1], [a]).values, Curve.of([1], [b]).values
    (there,), (back,) = relative_difference(ours, theirs), relative_difference(theirs, ours)
    assert there == back
    assert (there == 0) == (a == b or not (math.isfinite(a) or math.isfinite(b)))
    assert 0 <= there <= 2 or math.isinf(there)


def test_config_comes_before_code_before_numerics() -> None:
    facts = {"function": {"optim.lr": 1}, "code": {"torch": "2"}, "machine": {"world_size": "1"}}
    first = made_up([1.0, 2.0], [], **facts)
    expected = {
        "config": ("optim.lr 1 → 2; differing too: torch, world_size", ["function", "code", "machine"]),
        "code": ("torch 2 → 3; differing too: world_size", ["code", "machine"]),
        "numerics": ("world_size 1 → 2", ["machine"]),
    }
    others = {"function": {"optim.lr": 2}, "code": {"torch": "3"}, "machine": {"world_size": "2"}}
    for cause, (because, changed) in expected.items():
        found = diverge(first, made_up([1.0, 2.0 + 1e-6], [], **facts | {key: others[key] for key in changed}))
        assert (found.cause, found.because) == (cause, because)


def test_a_build_of_torch_that_one_run_did_not_record_is_no_difference() -> None:
    facts = {"function": {}, "machine": {}}
    for ours, theirs, cause in (
        ("2.11.0", "2.11.0+cu130", "not recorded"),
        ("2.11.0+cpu", "2.11.0+cu130", "code"),
        ("2.10.0", "2.11.0+cu130", "code"),
    ):
        runs = [
            made_up([1.0, loss], [], code={"torch": torch}, **facts) for loss, torch in ((2.0, ours), (3.0, theirs))
        ]
        assert diverge(*runs).cause == cause


def test_better_is_lower_for_a_loss_and_higher_else() -> None:
    run = made_up([1.0], [])
    for name, best in {"eval/bits_per_byte": 1, "eval/Perplexity": 1, "eval/accuracy": 3}.items():
        run.curves[name] = Curve.of([5, 10, 15], [2.0, 3.0, 1.0])
        assert figures(run).best[name] == (best, {1: 15, 3: 10}[best])


def test_an_environment_without_code_is_not_a_cause(runs: Path, tmp_path: Path) -> None:
    """Older runs wrote no such key."""
    old = tmp_path / "old"
    shutil.copytree(runs / "edited", old)
    environment = json.loads((old / "environment.json").read_text())
    del environment["starts"][0]["code"]
    (old / "environment.json").write_text(json.dumps(environment))
    comparison = compare(load_runs([runs / "base", old]))
    assert comparison.differences == []
    assert comparison.divergences[0].cause == "not recorded"
    assert tables.divergences(comparison).rows[0][-2] == "not recorded"
    assert np.isfinite(comparison.divergences[0].largest)
