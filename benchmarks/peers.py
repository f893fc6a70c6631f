"""Compares distrib with what a user would take instead, see README.md.

python benchmarks/peers.py                  everything, half an hour; writes results/DATE-peers.json, .md and .png
python benchmarks/peers.py --only "gpt 2"   print one workload on 2 processes
python benchmarks/peers.py --only "gpt 2" --profile   print where its steps spend their time
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "contenders"
sys.path.insert(0, str(HERE))

import imports  # noqa: E402
import profiles  # noqa: E402
from alternating import write_table  # noqa: E402
from turns import ADDRESS, CHECKED, PROFILE, Length  # noqa: E402

PLAIN, OURS = "plain DDP loop", "distrib"
KNOWN = {  # name -> module of contenders/, and its package
    PLAIN: ("plain", "torch"),
    OURS: ("with_distrib", "distrib"),
    "accelerate": ("with_accelerate", "accelerate"),
    "Lightning": ("with_lightning", "pytorch_lightning"),
    "transformers": ("with_transformers", "transformers"),
}
CONTENDERS = {name: known for name, known in KNOWN.items() if find_spec(known[1]) is not None}
CASES = {  # (workload, processes) -> length
    "gpt 2": Length(8, 4),
    "digits 2": Length(16, 200),
    "digits 1": Length(16, 400),
    "gpt 1": Length(8, 4),
}
SESSIONS = 5  # each starts all contenders again
TOLERANCE = 1e-3  # relative, of losses after CHECKED steps of AdamW whose fp32 sums have different orders
_TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]


@dataclass
class Running:
    """A contender's processes, each with a connection to it, in rank order."""

    launcher: subprocess.Popen[bytes]
    ranks: list[Connection]
    started: float

    def answers(self) -> list[Any]:
        """Return what each rank reports when it next waits."""
        return [rank.recv() for rank in self.ranks]

    def go(self) -> None:
        for rank in self.ranks:
            rank.send(None)

    def turn(self) -> list[Any]:
        self.go()
        return self.answers()


@contextmanager
def running(
    contender: str, processes: int, script: str, *arguments: Any, folder: Path, **more: str
) -> Iterator[Running]:
    """Run a contender's processes until they exit with code 0. `answers` first returns each rank's report of its first
    step.

    `contender` is its module. A rank runs `contenders/SCRIPT CONTENDER *arguments FOLDER`. `more`: environment
    variables.
    """
    with Listener(family="AF_UNIX") as listener:
        launcher = ["distrib", "launch", "--processes"] if contender == KNOWN[OURS][0] else _TORCHRUN
        member = [HERE / script, contender, *arguments, folder]
        command = [sys.executable, "-m", *launcher, processes, *member]
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment = {**os.environ, ADDRESS: str(listener.address), "OMP_NUM_THREADS": str(threads), **more}
        log = folder / "log"
        started = time.time()
        with log.open("wb") as output:
            process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
        try:
            connections = [listener.accept() for _ in range(processes)]
            by_rank = {connection.recv(): connection for connection in connections}
            yield Running(process, [by_rank[rank] for rank in range(processes)], started)
            if process.wait(60):
                raise RuntimeError(f"{contender} ended with exit code {process.returncode}")
        except BaseException:
            print(log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


@contextmanager
def contending(name: str, case: str, **more: str) -> Iterator[Running]:
    """Run a contender that takes turns in a case."""
    workload, processes = case.split()
    of_workload = (workload, CASES[case].blocks, CASES[case].steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(KNOWN[name][0], int(processes), "member.py", *of_workload, folder=Path(folder), **more) as one,
    ):
        yield one


def session(case: str) -> dict[str, dict[str, list[float]]]:
    """Start all contenders one after the other, let them take turns in steps, and evaluate. Return the measurements by
    name."""
    with ExitStack() as stack:
        contenders: dict[str, Running] = {}
        found: dict[str, dict[str, list[float]]] = {}
        for name in CONTENDERS:
            one = contenders[name] = stack.enter_context(contending(name, case))
            found[name] = {"start-up s": [max(one.answers()) - one.started], "step ms": []}
        losses = {name: _mean(one.turn()) for name, one in contenders.items()}
        _require_same(losses)
        for _ in range(CASES[case].blocks):
            for name, one in contenders.items():
                found[name]["step ms"].append(max(one.turn()) * 1000)
        for name, one in contenders.items():
            found[name]["memory MB"] = [max(one.turn()) / 1e6]
        for one in contenders.values():
            one.turn()  # it has warmed up
        for name, one in contenders.items():
            found[name]["evaluation ms"] = [max(seconds for seconds, _ in one.turn()) * 1000]
        for one in contenders.values():
            one.go()
    return found


def profile(case: str) -> list[str]:
    """Profile the steps of the plain loop and of distrib, each in a run of its own."""
    length, rows = CASES[case], []
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/profile"
        for name in (PLAIN, OURS):
            with contending(name, case, **{PROFILE: file}) as one:
                one.answers()
                for _ in range(length.blocks + 4):  # the checked steps, the blocks, and what comes after the last step
                    one.turn()
                one.go()
            rows += profiles.table(file, length.total - CHECKED, name)
    return rows


def _mean(ranks: list[list[float]]) -> list[float]:
    return [statistics.fmean(losses) for losses in zip(*ranks, strict=True)]


def _require_same(losses: dict[str, list[float]]) -> None:
    """Raise if a contender computes something else or does not learn."""
    for name, found in losses.items():
        off = max(abs(one - other) / other for one, other in zip(found, losses[PLAIN], strict=True))
        if len(found) != CHECKED or off > TOLERANCE or found[-1] >= found[0]:
            raise RuntimeError(f"{name} does not compute what {PLAIN} does: {found}, there {losses[PLAIN]}")


def summary(sessions: list[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the median of each figure and contender, and the median of its ratio to the plain loop's previous turn."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for figure in sessions[0][PLAIN]:
        values = {name: [v for one in sessions for v in one[name][figure]] for name in CONTENDERS}
        result[figure] = {}
        for name, own in values.items():
            ratios = [mine / plain for mine, plain in zip(own, values[PLAIN], strict=True)]
            result[figure][name] = {"median": statistics.median(own), "ratio": statistics.median(ratios), "all": own}
    return result


def verdicts(case: str, figures: dict[str, dict[str, dict[str, Any]]]) -> list[tuple[str, float, float]]:
    """Return the targets of this case, steps first: what, the figure, and its upper limit."""
    steps, starts, memory = (figures[key] for key in ("step ms", "start-up s", "memory MB"))
    peers = [name for name in CONTENDERS if name != OURS]
    best = min(peers, key=lambda name: steps[name]["ratio"])
    ratios = [a / b for a, b in zip(steps[OURS]["all"], steps[best]["all"], strict=True)]
    of_steps = (
        ("step, of the plain loop's", steps[OURS]["ratio"], 0.95)
        if case.startswith("digits")
        else (f"step, of the best peer's ({best})", statistics.median(ratios), 0.98)
    )
    later = statistics.median(a - b for a, b in zip(starts[OURS]["all"], starts[PLAIN]["all"], strict=True))
    return [
        of_steps,
        ("start-up, seconds after the plain script's", later, 0.5),
        ("memory of a rank, of the plain loop's", memory[OURS]["ratio"], 1.03),
    ]


def table(case: str, figures: dict[str, dict[str, dict[str, Any]]], explain: bool) -> list[str]:
    """Return the rows of a case. `explain` adds the reasons if a target is missed."""
    workload, processes = case.split()
    rows = [
        f"\n## {workload}, {processes} process(es)\n",
        f"| | {' | '.join(figures)} |",
        "|---|" + "---|" * len(figures),
    ]
    for name in CONTENDERS:
        cells = [f"{found[name]['median']:.4g} ({found[name]['ratio']:.3f})" for found in figures.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += ["", "| distrib | figure | target |", "|---|---|---|"]
    missed = []
    for what, value, target in verdicts(case, figures):
        missed.append(value > target)
        rows.append(f"| {what} | {value:.3f} | {target:.2f} {'missed' if missed[-1] else 'met'} |")
    steps_missed, *others_missed = missed
    if explain and steps_missed:
        rows += profile(case)
    if explain and any(others_missed):
        rows += ["", *imports.table()]
    return rows


def plot(cases: dict[str, dict[str, dict[str, dict[str, Any]]]], path: Path) -> None:
    """Plot step times relative to the plain loop: a dot for each turn, a bar for the median."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for case, figures in cases.items():
        steps = {name: found["all"] for name, found in figures["step ms"].items()}
        of_plain = {name: [a / b for a, b in zip(own, steps[PLAIN], strict=True)] for name, own in steps.items()}
        ratios[f"{case} process(es)"] = of_plain
    figure = bars(ratios)
    for axes in figure.axes:
        axes.axhline(1, color="grey", linewidth=0.8)
    figure.axes[0].set_ylabel("time of a step, by the plain loop's")
    figure.savefig(path, dpi=120)


def bars(values: dict[str, dict[str, list[float]]]) -> Any:
    """Return a figure with a bar for each title and contender, at the median of its values, which are dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(values), 4), layout="constrained")
    for number, (title, by_name) in enumerate(values.items(), start=1):
        axes = figure.add_subplot(1, len(values), number)
        for place, (name, own) in enumerate(by_name.items()):
            axes.bar(place, statistics.median(own), color="C1" if name == OURS else "C0", alpha=0.6)
            axes.plot([place] * len(own), own, ".", color="black", markersize=3)
        axes.set_xticks(range(len(by_name)), list(by_name), rotation=60, ha="right")
        axes.set_title(title, fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="distrib against what a user would take instead")
    parser.add_argument("--only", choices=CASES, help="one case; writes nothing")
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="how often all are started anew")
    parser.add_argument("--small", action="store_true", help="lengths that only show that it works; use with --only")
    parser.add_argument("--profile", action="store_true", help="print where steps spend their time, and nothing else")
    arguments = parser.parse_args()
    if arguments.small:
        CASES.update(dict.fromkeys(CASES, Length(2, 4)))
    chosen = [arguments.only] if arguments.only else list(CASES)
    if arguments.profile:
        for case in chosen:
            print("\n".join([f"\n## {case}", *profile(case)]))
        return
    if missing := KNOWN.keys() - CONTENDERS:
        print(f"left out, as not installed: {', '.join(sorted(missing))}; pip install -e '.[benchmarks]'")
    what = (
        "The same model, data, batch, optimizer and number of processes for all, from the same weights; the losses of "
        f"the first {CHECKED} steps agree. Medians, and in brackets those of the ratio to the plain loop's turn just "
        f"before. {arguments.sessions} sessions, in each of which all are started anew, wait for one another and take "
        "turns block by block."
    )
    versions = {package: version(package.replace("_", "-")) for _, package in CONTENDERS.values()}
    cases: dict[str, Any] = {}
    rows: list[str] = []
    for case in chosen:
        cases[case] = summary([session(case) for _ in range(arguments.sessions)])
        rows += table(case, cases[case], explain=not arguments.small)
        if arguments.only:
            print("\n".join(rows))
        else:  # after each case, because all take a long time
            path = write_table("peers", "Side by side with the peers", what, rows, {"cases": cases}, versions)
            plot(cases, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
