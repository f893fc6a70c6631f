"""Alerts are posted to a real HTTP server. They cannot hold a run up, and their URL is written nowhere."""

import json
import math
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Run, check, events, free_port, lines, ranks, refused, start, steps_done, until
from spoilt import Spoilt
from tasks import Masked
from torch import nn
from torch.utils.data import TensorDataset

from distrib import Config, Loss, OwnLoop, Trainer
from distrib.alert_options import AlertsConfig
from distrib.config_yaml import parse
from distrib.errors import ConfigError, TrainingError
from distrib.monitor.alerts import Alerts
from distrib.monitor.observer import ObserverWarning

TOKEN = "T0123/B4567/aVerySecretToken"
CONFIG: dict[str, Any] = {
    "data": {"global_batch_size": 8, "micro_batch_size": 4},
    "train": {"steps": 8},
    "tracking": {"wandb": "off"},
}
HOW = ["gradient", "", "", "loss", "", "", "", ""]  # what is not finite in each step
ALL = ["failed", "nonfinite", "hung", "stopped", "finished", "preempted"]


class Webhook:
    """A server on loopback. `answer`: an HTTP status; None: it answers when `open` is set, at the earliest."""

    def __init__(self, answer: int | None, location: str = "") -> None:
        self.messages: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.begun, self.answered, self.open = 0, 0, threading.Event()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                webhook.begun += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert body.count(b"\n") == 1
                assert body.endswith(b"\n")
                webhook.messages.append(json.loads(body))
                self.reply()

            def do_GET(self) -> None:
                self.reply()

            def reply(self) -> None:
                webhook.requests.append((self.command, self.path, self.headers["Content-Type"]))
                if answer is None:
                    webhook.open.wait(600)
                self.send_response(answer or 200)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                webhook.answered += 1

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{TOKEN}"


@contextmanager
def webhook(answer: int | None = 200, location: str = "") -> Iterator[Webhook]:
    hook = Webhook(answer, location)
    thread = threading.Thread(target=hook.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hook
    finally:
        hook.open.set()
        hook.server.shutdown()
        hook.server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def write(folder: Path, on: list[str], target: str = "tasks:Masked", arguments: Any = (), **changes: Any) -> None:
    task = {"target": target, **dict(arguments)}
    shutil.copy(Path(__file__).with_name("spoilt.py"), folder)  # a file of the user's
    text = yaml.safe_dump({**CONFIG, "task": task, "alerts": {"on": on}, **changes})
    (folder / "run.yaml").write_text(text)


def fit(folder: Path, task: Masked, on: list[str], **changes: Any) -> dict[str, Any]:
    config = Config.from_dict({**CONFIG, "name": "mine", "alerts": {"on": on}, **changes})
    return Trainer(task, config, folder).fit()


def check_secret(*texts: str, folder: Path) -> None:
    """Check that neither texts nor any file below the folder has the token or the server's address."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "events.jsonl" for path in files)
    for content in (*(text.encode() for text in texts), *(path.read_bytes() for path in files)):
        assert b"aVerySecretToken" not in content
        assert b"127.0.0.1" not in content


def warnings(run: Path) -> list[str]:
    found = [event["reason"] for event in lines(run, "events.jsonl") if event["event"] == "warning"]
    return [reason for reason in found if reason.startswith("alerts: ")]


def test_each_event_arrives_once(run: Run, tmp_path: Path) -> None:
    """Two steps are not finite. wandb is offline, so that its files are among those that are searched."""
    write(tmp_path, ALL, "spoilt:Spoilt", {"how": HOW}, tracking={"wandb": "offline"})
    with webhook() as hook:
        result = run("distrib", "train", "run.yaml", DISTRIB_ALERTS_URL=f" {hook.url}\n", WANDB_MODE="offline")
    check(result)
    folder = tmp_path / "runs/run"
    skipped = [event for event in lines(folder, "events.jsonl") if "nonfinite" in event.get("verdict", "")]
    finished = lines(folder, "events.jsonl")[-1]
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    about = {"run": "run", "run_dir": str(folder)}
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
    first = "run the gradient of step 1 is not finite, the step is skipped"
    second = "run the loss of step 4 is not finite, the step is skipped"
    assert [(event["step"], event["verdict"]) for event in skipped] == [
        (0, "skipped:nonfinite_gradient"),
        (3, "skipped:nonfinite_loss"),
    ]
    assert hook.messages == [
        {"event": "nonfinite", **about, "step": 0, "time": skipped[0]["time"], "text": first}
        | {"verdict": "skipped:nonfinite_gradient"},
        {"event": "nonfinite", **about, "step": 3, "time": skipped[1]["time"], "text": second}
        | {"verdict": "skipped:nonfinite_loss"},
        {"event": "finished", **about, "step": 8, "time": finished["time"]}
        | {"text": f"run finished after step 8: {numbers}", "metrics": metrics},
    ]
    assert hook.requests == [("POST", f"/services/{TOKEN}", "application/json")] * 3
    assert warnings(folder) == []
    check_secret(result.stdout, result.stderr, folder=tmp_path)
    check(run("distrib", "train", "run.yaml", DISTRIB_ALERTS_URL=hook.url))  # it has finished: nothing happens
    assert len(hook.messages) == 3


def test_only_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook() as hook:
        monkeypatch.setenv("MY_HOOK", hook.url)
        config = {**CONFIG, "alerts": {"on": ["nonfinite"], "url_from": "MY_HOOK"}}
        Trainer(Spoilt(HOW), Config.from_dict(config), tmp_path / "run").fit()
    assert [message["event"] for message in hook.messages] == ["nonfinite", "nonfinite"]


def test_steps_in_a_row_are_one_message_and_the_end_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run fails after four skipped steps."""
    how = ["", "loss", "gradient", "loss", "loss", "", "", ""]
    with webhook() as hook:
        monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
        with pytest.raises(TrainingError, match="were skipped") as error:
            fit(tmp_path / "run", Spoilt(how), ALL, train={"steps": 8, "max_skipped": 4})
    assert [(message["event"], message["step"]) for message in hook.messages] == [("nonfinite", 1), ("failed", 5)]
    failed = hook.messages[1]
    assert failed["error"] == f"TrainingError: {error.value}"
    assert failed["text"].startswith("mine failed after step 5: TrainingError: all steps from 2 to 5 were skipped")
    assert failed["time"] == lines(tmp_path / "run", "events.jsonl")[-1]["time"]
    check_secret(*capsys.readouterr(), folder=tmp_path)


def test_a_step_that_two_models_skip_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the first of them."""
    models = {name: nn.Linear(1, 1) for name in ("first", "second", "third")}
    dataset = TensorDataset(torch.ones(8, 1))
    with webhook() as hook:
        monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
        config = Config.from_dict({**CONFIG, "train": {"steps": 4}, "alerts": {"on": ["nonfinite"]}})
        with OwnLoop(config, dataset, models, tmp_path / "run") as loop:
            for window in loop:
                for index, batch in enumerate(window):
                    for name, engine in loop.engines.items():
                        bad = name != "first" and window.step in (1, 2)
                        with engine.microbatch(window, index):
                            total = engine.model(batch[0]).sum() * (math.nan if bad else 1.0)
                            if index == 0:
                                engine.zero_grad()
                            engine.backward(Loss(total, len(batch[0])))
                first, *others = (engine.step(lr=0.1) for engine in loop.engines.values())
                loop.record(first, second=others[0], third=others[1])
    (message,) = hook.messages
    assert (message["step"], message["model"], message["verdict"]) == (1, "second", "skipped:nonfinite_loss")
    assert message["text"] == "run the loss of second of step 2 is not finite, the step is skipped"


def test_a_run_that_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook() as hook:
        monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
        train = {"steps": 200, "stop": {"patience": 1, "min_delta": 0.1}}
        summary = fit(tmp_path / "run", Masked(), ALL, train=train, eval={"every_steps": 4})
    stopped, finished = hook.messages
    (event,) = [event for event in lines(tmp_path / "run", "events.jsonl") if event["event"] == "stopped"]
    assert stopped == {
        "run": "mine",
        "run_dir": str(tmp_path / "run"),
        **event,
        "text": f"mine stopped early after step {event['step']}: {event['reason']}",
    }
    assert (finished["event"], finished["step"]) == ("finished", summary["steps"])


def test_a_run_that_is_asked_to_stop(mark: str, tmp_path: Path) -> None:
    write(tmp_path, ALL, "tasks:Slow", train={"steps": 100_000})
    with webhook() as hook:
        process = start(mark, tmp_path, "train", "run.yaml", DISTRIB_ALERTS_URL=hook.url)
        until(lambda: steps_done(tmp_path / "runs/run") >= 3, "it does not begin")
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    (message,) = hook.messages
    done = lines(tmp_path / "runs/run")[-1]["step"] + 1
    assert (message["event"], message["step"], message["requeue"]) == ("preempted", done, False)
    assert message["text"] == f"run was asked to stop, and is saved after step {done}"
    check_secret(*said, folder=tmp_path)


def test_another_rank_fails(run: Run, tmp_path: Path) -> None:
    """Rank 0 alone posts, and names the rank."""
    write(tmp_path, ALL, "tasks:Misbehaving", {"how": "raise"})
    with webhook() as hook:
        result = run("distrib", "launch", "--processes", 2, "run.yaml", DISTRIB_ALERTS_URL=hook.url)
    check(result, code=1)
    (message,) = hook.messages
    assert message["event"] == "failed"
    assert re.fullmatch(r"rank 0 stopped, because rank 1 of 2 on \S+ had failed", message["error"])
    assert message["text"] == f"run failed after step {message['step']}: {message['error']}"
    check_secret(result.stdout, result.stderr, folder=tmp_path)


@pytest.mark.parametrize("on", [["failed", "hung"], ["failed"], ["finished"]])
def test_another_rank_hangs(run: Run, tmp_path: Path, on: list[str]) -> None:
    """Rank 0 waits for strategy.timeout. If `hung` is not asked for, it is a failure as others are."""
    write(tmp_path, on, "tasks:Misbehaving", {"how": "sleep"}, strategy={"timeout": 5})
    with webhook() as hook:
        check(run("distrib", "launch", "--processes", 2, "run.yaml", DISTRIB_ALERTS_URL=hook.url), code=1)
    expected = [event for event in ("hung", "failed") if event in on][:1]
    assert [message["event"] for message in hook.messages] == expected
    for message in hook.messages:
        error = message["error"]
        assert error.startswith("rank 0 stopped: it has waited too long for the others. ")
        assert re.search(r"at tasks\.py:\d+ in forward: rank 1 of 2 on ", error)
        assert message["text"].startswith(f"run {expected[0]} after step {message['step']}: rank 0 stopped: it has")


@pytest.mark.timeout(240)
def test_another_rank_is_suspended(mark: str, tmp_path: Path) -> None:
    """Rank 0 notices after 60 s that rank 1 sends no heartbeats, and ends at once, but for the message."""
    write(tmp_path, ALL, "tasks:Slow", train={"steps": 100_000})
    with webhook() as hook:
        process = start(mark, tmp_path, "launch", "--processes", 2, "run.yaml", DISTRIB_ALERTS_URL=hook.url)
        until(lambda: steps_done(tmp_path / "runs/run") >= 3, "it does not begin")
        ranks(mark)["1"].suspend()
        said = process.communicate(timeout=180)
    assert process.returncode == 1, said
    (message,) = hook.messages
    assert message["event"] == "hung"
    silent = r"rank 0 of 2 on \S+ stopped: rank 1 of 2 on \S+ has not been heard of for 60 s"
    assert re.fullmatch(silent, message["error"])
    assert message["step"] == steps_done(tmp_path / "runs/run")
    check_secret(*said, folder=tmp_path)


def test_no_server(run: Run, tmp_path: Path) -> None:
    """There is one warning, although three messages are lost."""
    write(tmp_path, ALL, "spoilt:Spoilt", {"how": HOW})
    url = f"http://127.0.0.1:{free_port()}/services/{TOKEN}"
    result = run("distrib", "train", "run.yaml", DISTRIB_ALERTS_URL=url)
    check(result)
    (warning,) = warnings(tmp_path / "runs/run")
    assert warning == (
        "alerts: a message to the URL in DISTRIB_ALERTS_URL could not be posted: ConnectionRefusedError: Connection "
        "refused; the run goes on, and does not warn again"
    )
    assert (result.stdout + result.stderr).count("alerts: ") == 1
    check_secret(result.stdout, result.stderr, folder=tmp_path)


@pytest.mark.parametrize("answer", [404, 302, 307])
def test_a_server_that_takes_nothing(answer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect is not followed, whether it leads to a file or to the same server."""
    for number, location in enumerate(("", "file:///etc/hostname", "/elsewhere")):
        with webhook(answer, location) as hook:
            monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
            fit(tmp_path / str(number), Masked(), ["finished"])
        assert [request[:2] for request in hook.requests] == [("POST", f"/services/{TOKEN}")]
        (warning,) = warnings(tmp_path / str(number))
        assert f"could not be posted: the server answered with HTTP status {answer};" in warning
        assert events(tmp_path / str(number))[-2:] == ["finished", "warning"]


def test_a_server_that_never_answers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is not finite. The run ends while the server still holds that request open."""
    write(tmp_path, ALL, "spoilt:Spoilt", {"how": HOW})
    with webhook(None) as hook:
        result = run("distrib", "train", "run.yaml", DISTRIB_ALERTS_URL=hook.url)
        check(result)
        assert (hook.begun, hook.answered) == (1, 0)
        assert steps_done(tmp_path / "runs/run") == 8
        assert warnings(tmp_path / "runs/run") == [
            "alerts: 3 message(s) to the URL in DISTRIB_ALERTS_URL had no answer within 3 s after the end of the run, "
            "and may be lost"
        ]
        check_secret(result.stdout, result.stderr, folder=tmp_path)
    with webhook(None) as hook:  # also in a script that goes on, where the thread does
        monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
        fit(tmp_path / "script", Spoilt(HOW), ALL)
        assert (hook.begun, hook.answered) == (1, 0)
        hook.open.set()
        until(lambda: hook.answered == 3, "the messages that waited are not posted")


def test_more_messages_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not answer. The observer is called as a run calls it, so that 102 steps take no time."""
    with webhook(None) as hook:
        monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
        alerts = Alerts(AlertsConfig(on=("nonfinite",)))
        alerts.on_start({"name": "mine", "run_dir": "/runs/mine", "step": 0})
        for step in range(0, 204, 2):  # one is being posted, 100 wait
            alerts.on_event({"event": "skipped", "time": "now", "step": step, "verdict": "skipped:nonfinite_loss"})
            until(lambda: hook.begun == 1, "nothing is posted")
        with pytest.raises(ObserverWarning, match="could not be posted: 100 messages wait already; the run goes on"):
            alerts.on_step({"step": 204})
        alerts.on_step({"step": 205})


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "the environment variable DISTRIB_ALERTS_URL is not set; set it to the webhook's URL, or leave out"),
        (" ", "the environment variable DISTRIB_ALERTS_URL is not set"),
        (f"ftp://127.0.0.1/{TOKEN}", "is not a URL like https://HOST/PATH"),
        (f"file:///{TOKEN}", "is not a URL like https://HOST/PATH"),
        (f"hooks/{TOKEN}", "is not a URL like https://HOST/PATH"),
        (f"https://127.0.0.1:99999/{TOKEN}", "is not a URL like https://HOST/PATH"),
        (f"https://127.0.0.1/a b/{TOKEN}", "is not a URL like https://HOST/PATH"),
        (f"https://me:pw@127.0.0.1/{TOKEN}", "is not a URL like https://HOST/PATH"),
    ],
)
def test_no_url_is_refused_before_training(run: Run, tmp_path: Path, url: str | None, said: str) -> None:
    write(tmp_path, ALL)
    given = {} if url is None else {"DISTRIB_ALERTS_URL": url}
    line = refused(run("distrib", "train", "run.yaml", **given))
    assert "alerts.url_from: " in line
    assert said in line
    assert "aVerySecretToken" not in line
    assert not (tmp_path / "runs").exists()


def test_all_processes_end_without_a_url(run: Run, tmp_path: Path) -> None:
    write(tmp_path, ALL)
    assert "DISTRIB_ALERTS_URL is not set" in refused(run("distrib", "launch", "--processes", 2, "run.yaml"))
    check(run("distrib", "explain", "run.yaml"))  # may run where there is no such variable


@pytest.mark.parametrize(
    "alerts",
    [
        f"https://127.0.0.1/{TOKEN}",
        {"url": f"https://127.0.0.1/{TOKEN}", "on": ["failed"]},
        {"url_from": f"https://127.0.0.1/{TOKEN}"},
        {"url_from": ""},
    ],
)
def test_a_url_in_the_config_is_refused_and_not_shown(alerts: Any) -> None:
    with pytest.raises(ConfigError, match="alerts: the webhook's URL is a secret, and a config is shown") as error:
        Config.from_dict({**CONFIG, "alerts": alerts})
    assert "aVerySecretToken" not in str(error.value)
    assert "\n" not in str(error.value)


def test_events_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_dict({**CONFIG, "alerts": {"on": ["failed", "ended"]}})
    assert str(error.value).startswith("config: alerts.on.1: 'ended': ")
    assert all(f"'{name}'" in str(error.value) for name in ALL)
    for alerts, said in (({"on": []}, "alerts.on: "), ({"to": 1}, "alerts.to: unknown key"), (5, "alerts: 5")):
        with pytest.raises(ConfigError, match=said):
            Config.from_dict({**CONFIG, "alerts": alerts})


def test_alerts_decide_nothing() -> None:
    """A config without the section is dumped as before there was one."""
    without, null = (Config.from_dict({**CONFIG, **more}) for more in ({}, {"alerts": None}))
    given = Config.from_dict({**CONFIG, "alerts": {}})
    assert "alerts" not in without.dump()
    assert without.dump() == null.dump()
    assert not [key for key in without.flat() if "alerts" in key]
    assert without.identity() == given.identity()
    assert Config.from_dict(yaml.safe_load(given.dump())) == given
    assert given.alerts is not None
    assert given.alerts.on == ("failed", "nonfinite", "hung", "stopped", "finished")
    assert list(given.flat())[-2:] == ["alerts.on", "alerts.url_from"]


def test_the_page_shows_a_message_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/tracking.md has the keys of a real message, and its section of the config is valid."""
    page = (ROOT / "docs" / "tracking.md").read_text()
    section = page[page.index("## Alerts") :]
    (block,) = re.findall(r"^```json\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (keys,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    example, on = json.loads(block), parse(keys, "the page")["alerts"]["on"]  # to YAML 1.1, `on` is true
    with webhook() as hook:
        monkeypatch.setenv("DISTRIB_ALERTS_URL", hook.url)
        with pytest.raises(TrainingError):
            fit(tmp_path / "run", Spoilt(HOW), on, train={"steps": 8, "on_nonfinite": "stop"})
    message = hook.messages[-1]
    assert list(message) == list(example)
    assert message["event"] == example["event"] == "failed"
    assert message["error"] == example["error"]
