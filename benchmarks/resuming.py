"""Compares saving and resuming with the peers, see README.md.

python benchmarks/resuming.py               all of it, in 15 minutes; writes results/DATE-resuming.json, .md and .png
python benchmarks/resuming.py --only late   one case, printed
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "contenders"))

from alternating import folder_on_disk, write_table
from numbered import WORKLOADS, Numbered
from peers import CONTENDERS, OURS, TOLERANCE, bars, running
from saves import EVERY, Made

MODULES = {name: module for name, (module, _) in CONTENDERS.items()}
if "Lightning" in MODULES:
    MODULES["Lightning, stateful"] = "with_lightning_stateful"
PROCESSES = 2
ROUNDS = {"large": 5, "late": 3}  # in the case "late", a start of the plain loop takes most of a minute
RIGHT, AGAIN, ELSEWHERE = "right", "began its epoch again", "read samples that stand elsewhere in its order"
Seconds = dict[str, dict[str, list[float]]]  # by figure and contender


@dataclass
class Uninterrupted:
    """The steps of an uninterrupted run, with which the first step after a resume is compared."""

    begun: list[Made]  # the first one
    made: list[Made]  # that after the last save

    def has_loss_of(self, made: list[Made]) -> bool:
        loss, there = (statistics.fmean(rank.loss for rank in step) for step in (made, self.made))
        return abs(loss - there) <= TOLERANCE * abs(there)

    def place_of(self, made: list[Made]) -> str:
        """Describe where the samples are in the contender's order."""
        read, right, first = ([rank.samples for rank in step] for step in (made, self.made, self.begun))
        return RIGHT if read == right else AGAIN if read == first else ELSEWHERE


def saved(workload: str, saves: int, step: int, folder: Path, seconds: Seconds) -> dict[str, Uninterrupted]:
    """Start all contenders one after the other, and let them take turns in saving. Each then makes one more step; if
    `step` is not 0, with the samples of that step."""
    steps = {}
    with ExitStack() as stack:
        contenders = {}
        for name, module in MODULES.items():
            (folder / name).mkdir()
            one = running(module, PROCESSES, "saving_member.py", workload, saves, step, 0, folder=folder / name)
            contenders[name] = stack.enter_context(one)
            steps[name] = Uninterrupted(contenders[name].answers(), [])
        for _ in range(saves):
            for name, one in contenders.items():
                waits, on_disk = zip(*one.turn(), strict=True)
                seconds["save s"][name].append(max(waits))
                seconds["on disk s"][name].append(max(on_disk))
        for name, one in contenders.items():
            steps[name].made = one.turn()
            one.go()
    return steps


def started(name: str, workload: str, resumed: bool, folder: Path) -> tuple[float, list[Made]]:
    """Return the seconds from the launcher's start to the end of the first step, and that step."""
    with running(MODULES[name], PROCESSES, "saving_member.py", workload, 0, 0, int(resumed), folder=folder) as one:
        made = one.answers()
        one.go()
    return max(rank.at for rank in made) - one.started, made


def measure(case: str, workload: str, rounds: int) -> dict[str, Any]:
    """Return the seconds, and for each contender and round whether its first step after a resume was the right one."""
    late = case == "late"
    steps = len(Numbered(*WORKLOADS[workload]).train) // Numbered.global_batch_size
    step = steps * 9 // 10 // EVERY * EVERY if late else 0
    figures = ("save s", "on disk s", "fresh s", "resumed s")
    seconds: Seconds = {figure: {name: [] for name in MODULES} for figure in figures}
    places: dict[str, set[str]] = {name: set() for name in MODULES}
    losses: dict[str, set[bool]] = {name: set() for name in MODULES}
    with folder_on_disk() as folder:
        uninterrupted = saved(workload, 1 if late else rounds, step, folder, seconds)
        if late:
            for name in MODULES.keys() - {OURS}:  # whose ledger has so many lines by now
                import_module(MODULES[name]).renumber(folder / name, step)
        for _ in range(rounds):
            for name in MODULES:
                with tempfile.TemporaryDirectory(dir=folder) as fresh:
                    seconds["fresh s"][name].append(started(name, workload, False, Path(fresh))[0])
                taken, made = started(name, workload, True, folder / name)
                seconds["resumed s"][name].append(taken)
                places[name].add(uninterrupted[name].place_of(made))
                losses[name].add(uninterrupted[name].has_loss_of(made))
    if late:
        del seconds["save s"], seconds["on disk s"]
    return {
        "step": step or EVERY * rounds,
        "of steps": steps,
        "seconds": seconds,
        "samples": {name: sorted(found) for name, found in places.items()},
        "right loss": {name: found == {True} for name, found in losses.items()},
    }


def later(seconds: Seconds) -> dict[str, list[float]]:
    """Return by contender how much later the first step was in a resumed start than in the fresh start before it."""
    pairs = {name: zip(seconds["fresh s"][name], own, strict=True) for name, own in seconds["resumed s"].items()}
    return {name: [resumed - fresh for fresh, resumed in of_both] for name, of_both in pairs.items()}


def table(case: str, result: dict[str, Any]) -> list[str]:
    seconds: Seconds = {**result["seconds"], "resumed - fresh s": later(result["seconds"])}
    columns = [*seconds, "resumed / fresh", "right samples", "right loss"]
    rows = [
        f"\n## {case}: resumed at step {result['step']:,} of {result['of steps']:,}\n",
        f"| | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name in MODULES:
        medians = [f"{statistics.median(own[name]):.3f}" for own in seconds.values()]
        pairs = zip(seconds["resumed s"][name], seconds["fresh s"][name], strict=True)
        ratio = statistics.median(resumed / fresh for resumed, fresh in pairs)
        right = ["yes" if yes else "**no**" for yes in (result["samples"][name] == [RIGHT], result["right loss"][name])]
        rows.append(f"| {name} | {' | '.join([*medians, f'{ratio:.2f}', *right])} |")
    wrong = {name: found for name, found in result["samples"].items() if found != [RIGHT]}
    return rows + [f"\n{name}: after its resume it {' or '.join(found)}." for name, found in wrong.items()]


def plot(cases: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot seconds: a dot for each save or start, a bar for the median."""
    waits = {"a save, large": cases["large"]["seconds"]["save s"]}
    figure = bars(waits | {f"resumed - fresh, {case}": later(result["seconds"]) for case, result in cases.items()})
    figure.axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="saving and resuming, side by side with the peers")
    parser.add_argument("--only", choices=ROUNDS, help="one case; writes nothing")
    parser.add_argument("--rounds", type=int, help="saves, and starts of each kind, of each contender")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works; writes nothing")
    arguments = parser.parse_args()
    rounds = {case: arguments.rounds or number for case, number in ROUNDS.items()}
    what = (
        f"{PROCESSES} processes, medians of alternating rounds: {rounds['large']} of large, a model of 25 million "
        f"parameters (300 MB with AdamW's moments), and {rounds['late']} of late, 10 million samples, resumed at 90 % "
        "of the first epoch. 'save': until the next step could begin; 'on disk': until the checkpoint was complete and "
        "synced; 'fresh' and 'resumed': from the launcher's start to the end of the first step. Samples and loss of "
        "the first step after a resume are held against those of the same contender's run that was not interrupted "
        f"(loss: {TOLERANCE:g} relative)."
    )
    cases: dict[str, Any] = {}
    rows: list[str] = []
    for case in [arguments.only] if arguments.only else ROUNDS:
        cases[case] = measure(case, f"{case} small" if arguments.small else case, rounds[case])
        rows += table(case, cases[case])
    if arguments.only or arguments.small:
        print("\n".join(rows))
        return
    versions = {package: version(package.replace("_", "-")) for _, package in CONTENDERS.values()}
    title = "Saving and resuming, side by side with the peers"
    path = write_table("resuming", title, what, rows, {"cases": cases}, versions)
    plot(cases, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
