"""`introvert status`, over an endpoint that answers as the gateway does."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from deploy.commands.status import SHOWN
from server.admin_key import admin_key_file


def worker(number: int, experts: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "id": f"worker-{number}",
        "state": "ready",
        "url": "http://127.0.0.1:1",
        "node": "127.0.0.1",
        "devices": f"cuda:{number}",
        "engine": "vllm 0.32.0",
        "pid": 1,
        "experts": experts,
        "restarts": number,
        "detail": "",
        "slots": 8,
        **changes,
    }


def status(experts: int = 2, **changes: Any) -> dict[str, Any]:
    names = [f"expert-{n:04d}@{n:012x}" for n in range(experts)]
    return {
        "router": {"state": "ready", "bundle": "cccccccccccc", "detail": ""},
        "in_flight": {"worker-0": 3},
        "queued": {"worker-0": 7},
        "requests": {"expert-0000": 1234, "base": 5},
        "cold_loads": {"expert-0000": 2},
        "processes": [
            {
                "process": 0,
                "pid": 4711,
                "started": "2026-01-01T00:00:00+00:00",
                "table_version": 9,
                "in_flight": 3,
            }
        ],
        "processes_expected": 2,
        "change": None,
        "table": {
            "version": 9,
            "bundle": "cccccccccccc",
            "base_name": "base",
            "max_model_len": 128,
            "workers": [
                worker(0, names),
                worker(1, names[:1], detail="expert-0001 was refused: its fingerprint differs"),
            ],
            "experts": [
                {
                    "id": name.partition("@")[0],
                    "version": name.partition("@")[2],
                    "served_name": name,
                    "cluster": n,
                    "workers": ["worker-0"] if n else ["worker-0", "worker-1"],
                }
                for n, name in enumerate(names)
            ],
        },
        **changes,
    }


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves one status; the URL. With a key, only who shows it is answered."""
    servers = []

    def start(answer: dict[str, Any], key: str | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = key is None or self.headers["authorization"] == f"Bearer {key}"
                error = {"error": {"message": "The admin key is needed."}}
                body = json.dumps(answer if known else error).encode()
                self.send_response(200 if known else 401)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_tables_of_workers_experts_and_processes(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--url", serve(status())]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["worker-0"][-5:] == ["2", "8", "3", "7", "0"]
    assert rows["expert-0000"][2:] == ["ready", "worker-0,", "worker-1", "1,234", "2"]
    assert rows["base"][-2:] == ["5", "–"]
    assert rows["0"] == ["0", "4711", "2026-01-01", "00:00:00", "9", "3"]
    assert "worker-1: expert-0001 was refused: its fingerprint differs" in out
    assert "1 of its processes do not answer" in out
    assert max(map(len, out.splitlines())) <= 100


def test_an_expert_without_all_its_homes(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    answer = status()
    answer["table"]["workers"][1]["state"] = "down"
    assert main(["status", "--url", serve(answer)]) == 1
    assert "partly ready" in capsys.readouterr().out


def test_a_change_under_way(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    change = {
        "bundle": "dddddddddddd",
        "place": "next",
        "state": "canary",
        "share": 0.25,
        "verified": 1,
        "total": 2,
        "refused": {"expert-0001@x": "its fingerprint differs"},
        "detail": "",
        "took_s": None,
    }
    assert main(["status", "--url", serve(status(change=change))]) == 0
    out = capsys.readouterr().out
    assert "change to bundle dddddddddddd: canary, 25% of the conversations, 1 of 2" in out
    assert "expert-0001@x: its fingerprint differs" in out


def test_thousands_of_experts_are_not_listed(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = status(5000)
    answer["table"]["workers"][0]["experts"].pop()
    assert main(["status", "--url", serve(answer)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("expert-")]) == SHOWN + 1
    assert next(line for line in lines if "not ready" in line).startswith("expert-4999")
    assert f"and {4999 - SHOWN:,} more" in "\n".join(lines)


def test_where_the_admin_key_comes_from(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INTROVERT_ADMIN_KEY", raising=False)
    url = serve(status(), key="right")
    assert main(["status", "--url", url]) == 1
    assert "status 401: The admin key is needed." in capsys.readouterr().err

    file = tmp_path / "key"
    file.write_text("right\n")
    assert main(["status", "--url", url, "--admin-key-file", str(file)]) == 0
    monkeypatch.setenv("INTROVERT_ADMIN_KEY", "right")
    assert main(["status", "--url", url]) == 0
    monkeypatch.delenv("INTROVERT_ADMIN_KEY")
    made = admin_key_file(int(url.rpartition(":")[2]))
    made.parent.mkdir(parents=True)
    made.write_text("right\n")
    assert main(["status", "--url", url]) == 0
    assert main(["status", "--url", url, "--admin-key-file", str(tmp_path / "none")]) == 2
