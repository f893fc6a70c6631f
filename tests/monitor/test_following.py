"""RunTail returns every line once, in the order in which it was written, whenever it reads."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from distrib.monitor.run_tail import News, RunTail
from distrib.run_folder.folder import RunDir

START = {"world_size": 1, "strategy": "single", "launcher": "plain"}


def step_line(number: int, seconds: float = 0.1) -> str:
    entry = {"step": number, "epoch": 0, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "count": 4}
    return json.dumps({**entry, "verdict": "applied", "samples": "0" * 16, "seconds": seconds}) + "\n"


def described(news: News) -> tuple[str, int]:
    return news.kind, news.entry.get("step", -1)


@given(st.lists(st.sampled_from(["step", "evaluation", "skipped", "look"]), max_size=60), st.data())
def test_the_order_of_a_run(doings: list[str], data: st.DataObject) -> None:
    """Lines may be read in part; the rest comes later."""
    with TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        follower, seen, written, steps = RunTail(run), [], [], 0
        for doing in doings:
            if doing == "look":
                seen += [described(news) for news in follower.entries()]
                continue
            if doing == "step":
                path, at, line = run.steps, steps, step_line(steps)
                steps += 1
            elif doing == "evaluation":
                path, at, line = run.evals, steps, json.dumps({"step": steps, "count": 1, "metrics": {}}) + "\n"
            else:
                event = {"event": doing, "step": steps, "verdict": "skipped:nonfinite_loss"}
                path, at, line = run.events, steps, json.dumps(event) + "\n"
            torn = data.draw(st.integers(0, len(line)))
            for part in (line[:torn], line[torn:]):
                with path.open("a") as file:
                    file.write(part)
                if data.draw(st.booleans()):
                    seen += [described(news) for news in follower.entries()]
            written.append((doing, at))
        seen += [described(news) for news in follower.entries()]
    # An event and an evaluation between the same two steps may be seen in either order.
    assert [one for one in seen if one[0] == "step"] == [one for one in written if one[0] == "step"]
    assert sorted(seen) == sorted(written)
    for kind in ("evaluation", "skipped"):
        of_kind = [one for one in seen if one[0] in ("step", kind)]
        assert of_kind == [one for one in written if one[0] in ("step", kind)]


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    """Steps that were cut off come again; events of the earlier start do not wait for them."""
    run = RunDir(tmp_path)

    def step(number: int) -> None:
        with run.steps.open("a") as file:
            file.write(step_line(number, 1 / 3**number))

    run.event("started", **START)
    for number in range(4):
        step(number)
    run.event("checkpoint", step=4)
    follower = RunTail(run)
    assert [described(news) for news in follower.entries()] == [
        *(("started", -1), ("step", 0), ("step", 1), ("step", 2), ("step", 3), ("checkpoint", 4)),
    ]
    run.event("checkpoint", step=9)
    whole = run.steps.read_text().splitlines(keepends=True)
    run.steps.write_text("".join(whole[:2]))
    run.event("started", **START)
    run.event("resumed", step=2, passed_over=[])
    step(2)
    assert [described(news) for news in follower.entries()] == [
        *(("checkpoint", 9), ("started", -1), ("resumed", 2), ("step", 0), ("step", 1), ("step", 2)),
    ]


def test_a_fork_that_fails_at_once(tmp_path: Path) -> None:
    """It continues after a step of another run, and has no step of its own."""
    run = RunDir(tmp_path)
    run.event("started", **START)
    run.event("resumed", step=40, passed_over=[])
    run.event("failed", step=0, error="why")
    assert [described(news) for news in RunTail(run).entries()] == [("started", -1), ("resumed", 40), ("failed", 0)]


def test_more_steps_than_are_kept_in_memory(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.steps.write_text("".join(step_line(number) for number in range(25_001)))
    run.event("failed", step=25_001, error="why")
    assert [described(news)[1] for news in RunTail(run).entries()] == [*range(25_001), 25_001]
