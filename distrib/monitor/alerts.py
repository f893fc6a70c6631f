"""`Alerts`: the observer that posts a line of JSON to a webhook when something happens that the config names.

The webhook's URL is a secret. It is read from an environment variable, and no message contains any part of it.
"""

import json
import os
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from queue import Full, Queue
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from distrib.alert_options import AlertsConfig
from distrib.errors import ConfigError
from distrib.monitor.observer import Observer, ObserverWarning
from distrib.processes import heartbeat
from distrib.processes.failures import WAITED
from distrib.run_folder.ledger import now

_SECONDS_TO_ANSWER = 10.0
_SECONDS_AT_THE_END = 3.0  # other ranks wait 5 s for one that fails
_MOST_WAITING = 100  # messages
_MOST_OF_A_TEXT = 500  # characters


def require_url(config: AlertsConfig | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the webhook's URL; "" if the config has no alerts. Raises ConfigError, which does not show the URL."""
    if config is None:
        return ""
    url, variable = environ.get(config.url_from, "").strip(), config.url_from
    if not url:
        raise ConfigError(
            f"alerts.url_from: the environment variable {variable} is not set; set it to the webhook's URL, or leave "
            "out the section alerts"
        )
    if not _is_webhook(url):
        raise ConfigError(
            f"alerts.url_from: what the environment variable {variable} holds is not a URL like https://HOST/PATH; "
            "set it to the webhook's"
        )
    return url


class Alerts(Observer):
    """Posts to the webhook from a thread, so that training does not wait for it."""

    def __init__(self, config: AlertsConfig) -> None:
        """Raises ConfigError if there is no URL."""
        self._config, self._warned = config, False
        self._outbox = _Outbox(require_url(config))
        self._run: dict[str, Any] = {}  # what each message says about the run
        self._steps_done = 0
        self._last_skipped = -2  # the last step that was not finite

    def on_start(self, start: dict[str, Any]) -> None:
        self._run = {"run": start["name"], "run_dir": start["run_dir"]}
        self._steps_done = start["step"] or 0
        heartbeat.before_exit.append(self._lost)

    def on_step(self, step: dict[str, Any]) -> None:
        self._steps_done = step["step"] + 1
        self._warn()

    def on_event(self, event: dict[str, Any]) -> None:
        """Post for a step that was not finite, the first of several in a row, and for a run that stops early."""
        kind, step, time = event["event"], event.get("step"), event["time"]
        if kind == "skipped" and event["verdict"].startswith("skipped:nonfinite"):
            first, self._last_skipped = event["step"] - self._last_skipped not in (0, 1), event["step"]
            if first:
                what = event["verdict"].removeprefix("skipped:nonfinite_")
                model = {"model": event["model"]} if "model" in event else {}
                whose = f" of {event['model']}" if model else ""
                text = f"the {what}{whose} of step {event['step'] + 1} is not finite, the step is skipped"
                self._post("nonfinite", step, time, text, verdict=event["verdict"], **model)
        elif kind == "stopped":
            more = {key: event[key] for key in ("metric", "reason", "best_step", "best_value")}
            self._post("stopped", step, time, f"stopped early after step {step}: {event['reason']}", **more)

    def on_end(self, end: dict[str, Any]) -> None:
        """Post, and wait at most some seconds until all is posted."""
        with suppress(ValueError):
            heartbeat.before_exit.remove(self._lost)
        kind, step, time = end["event"], end["step"], end["time"]
        if kind == "failed":
            self._post_failure(step, time, end["error"], hung=WAITED in end["error"])
        elif kind == "preempted":
            requeued = ", and the job is requeued" if end["requeue"] else ""
            text = f"was asked to stop, and is saved after step {step}{requeued}"
            self._post(kind, step, time, text, requeue=end["requeue"])
        else:
            metrics = end["summary"]["metrics"]
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()) if value is not None)
            self._post(kind, step, time, f"finished after step {step}: {numbers}", metrics=metrics)
        left = self._outbox.close(_SECONDS_AT_THE_END)
        self._warn()
        if left and not self._warned:
            raise ObserverWarning(
                f"alerts: {left} message(s) to the URL in {self._config.url_from} had no answer within "
                f"{_SECONDS_AT_THE_END:g} s after the end of the run, and may be lost"
            )

    def _lost(self, reason: str) -> None:
        """Post that a rank is lost, from another thread, before this process ends."""
        self._post_failure(self._steps_done, now(), reason, hung=True)
        self._outbox.close(_SECONDS_AT_THE_END)

    def _post_failure(self, step: int, time: str, error: str, hung: bool) -> None:
        event = "hung" if hung and "hung" in self._config.on else "failed"
        self._post(event, step, time, f"{event} after step {step}: {error}", error=error)

    def _post(self, event: str, step: int | None, time: str, text: str, **more: Any) -> None:
        """Post a message, if the config has this `event`."""
        if event in self._config.on:
            text = " ".join(f"{self._run['run']} {text}".split())
            text = text if len(text) <= _MOST_OF_A_TEXT else f"{text[: _MOST_OF_A_TEXT - 1]}…"
            self._outbox.put({"event": event, **self._run, "step": step, "time": time, "text": text, **more})

    def _warn(self) -> None:
        """Warn once of a message that could not be posted. Raises ObserverWarning."""
        if self._outbox.problem is not None and not self._warned:
            self._warned = True
            raise ObserverWarning(
                f"alerts: a message to the URL in {self._config.url_from} could not be posted: {self._outbox.problem}; "
                "the run goes on, and does not warn again"
            )


class _Outbox:
    """Messages that wait for the thread that posts them. `problem`: why the first that was lost could not be posted."""

    def __init__(self, url: str) -> None:
        self.problem: str | None = None
        self._url, self._opener = url, build_opener(_NoRedirects)
        self._waiting: Queue[bytes | None] = Queue(_MOST_WAITING)  # None: the thread ends
        self._thread: threading.Thread | None = None

    def put(self, message: dict[str, Any]) -> None:
        """Have the message posted. It is lost if too many wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._post_all, name="alerts", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(json.dumps(message, allow_nan=False).encode() + b"\n")
        except Full:
            self.problem = self.problem or f"{_MOST_WAITING} messages wait already"

    def close(self, seconds: float) -> int:
        """Wait at most so long until all messages are posted. Return how many are left."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, seconds)
            left = self._waiting.unfinished_tasks
        with suppress(Full):
            self._waiting.put_nowait(None)
        return left

    def _post_all(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                headers = {"Content-Type": "application/json", "User-Agent": "distrib"}
                self._opener.open(Request(self._url, message, headers), timeout=_SECONDS_TO_ANSWER).close()  # noqa: S310
            except Exception as error:
                self.problem = self.problem or _reason(error)
            finally:
                self._waiting.task_done()


class _NoRedirects(HTTPRedirectHandler):
    """Follows no redirect: urllib would drop the message, and might leave https."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_webhook(url: str) -> bool:
    try:
        parts = urlsplit(url)
        usable = parts.port is None or parts.port > 0
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url and parts.username is None
    return usable and plain and parts.scheme in ("http", "https") and bool(parts.hostname)


def _reason(error: BaseException) -> str:
    """Return why a message could not be posted. Messages of urllib may contain the URL or the host."""
    if isinstance(error, HTTPError):
        return f"the server answered with HTTP status {error.code}"
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"the server has not answered within {_SECONDS_TO_ANSWER:g} s"
    name = type(error).__name__
    if isinstance(error, ssl.SSLError):
        return f"{name}: {error.reason}"
    if isinstance(error, socket.gaierror):
        return f"{name}: the host is not found"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name}: {os.strerror(error.errno)}"
    return name
