"""As much of wandb's server as its client needs to send a run: GraphQL answers, file streams, uploads.

python wandb_server.py PORT FOLDER: what was received is in FOLDER/runs.json, and is there again after a restart.
"""

import gzip
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

PORT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
STATE = FOLDER / "runs.json"
RUNS: dict[str, dict[str, Any]] = json.loads(STATE.read_text()) if STATE.exists() else {}
LOCK = Lock()
HISTORY, EVENTS = "wandb-history.jsonl", "wandb-events.jsonl"


def answer(query: str, variables: dict[str, Any]) -> dict[str, Any]:
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    name = found[1] if found else ""
    if name == "Viewer":
        return {"viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}
    if name == "RunResumeStatus":
        run = RUNS.get(variables["name"])
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "us"}, "bucket": run and bucket(run)}}
    if name == "UpsertBucket":
        run = RUNS.setdefault(variables["name"], {"name": variables["name"], "starts": 0, "files": {}, "ends": []})
        run["told"] = {**run.get("told", {}), **{k: v for k, v in variables.items() if v is not None}}
        return {"upsertBucket": {"bucket": bucket(run), "inserted": True}}
    if name == "CreateRunFiles":
        files = [{"name": file, "uploadUrl": f"http://127.0.0.1:{PORT}/upload/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    if name == "ServerFeaturesQuery":
        return {"serverInfo": {"features": []}}
    return {}


def bucket(run: dict[str, Any]) -> dict[str, Any]:
    lines = {name: run["files"].get(name, []) for name in (HISTORY, EVENTS)}
    told = run["told"]
    return {
        "id": run["name"],
        "name": run["name"],
        "displayName": told.get("displayName") or run["name"],
        "description": "",
        "sweepName": None,
        "project": {"id": "p", "name": told["project"], "entity": {"id": "e", "name": "us"}},
        "summaryMetrics": run["files"].get("wandb-summary.json", ["{}"])[-1],
        "logLineCount": 0,
        "historyLineCount": len(lines[HISTORY]),
        "eventsLineCount": len(lines[EVENTS]),
        "historyTail": json.dumps(lines[HISTORY][-1:]),
        "eventsTail": json.dumps(lines[EVENTS][-1:]),
        "config": told.get("config", "{}"),
        "tags": told.get("tags", []),
        "notes": told.get("notes"),
        "wandbConfig": json.dumps({"t": {}}),
    }


def receive(run: dict[str, Any], stream: dict[str, Any]) -> None:
    for name, chunk in stream.get("files", {}).items():
        lines = run["files"].setdefault(name, [])
        lines[chunk["offset"] :] = chunk["content"]
    if stream.get("complete") is not None or stream.get("preempting"):
        run["ends"].append({key: stream.get(key) for key in ("complete", "exitcode", "preempting")})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request_of_any_kind(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        response: dict[str, Any] = {}
        with LOCK:
            if self.path == "/graphql":
                request = json.loads(body)
                response = {"data": answer(request["query"], request.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                receive(RUNS[self.path.split("/")[-2]], json.loads(body))
            partial = STATE.with_suffix(".partial")
            partial.write_text(json.dumps(RUNS))
            partial.replace(STATE)
        data = json.dumps(response).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = handle_request_of_any_kind  # noqa: N815, as http.server calls them


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
