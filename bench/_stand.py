"""A test stand: processes pinned to cores, paused while others are measured, ended for certain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.output import note

END_S = 90.0
"""A whole service ends within this, its engines too."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy that the environment names is not for this machine's own processes."""


@dataclass
class Program:
    """A running program, in a process group of its own."""

    process: subprocess.Popen[str]
    log: Path

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def wait_answering(self, url: str, seconds: float, body: bytes | None = None) -> None:
        """Until `url` answers with 200; POST where there is a body."""
        deadline = time.monotonic() + seconds
        headers = {"content-type": "application/json"}
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.process.args!r} ended early; see {self.log}")
            try:
                request = urllib.request.Request(url, body, headers)
                with DIRECT.open(request, timeout=10) as answer:
                    if answer.status == 200:
                        return
            except (OSError, urllib.error.HTTPError) as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{url} does not answer: {error}; see {self.log}") from None
            time.sleep(0.2)

    def stop(self) -> None:
        self.go_on()
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _end(*_: object) -> None:
    raise SystemExit("ended by SIGTERM")


signal.signal(signal.SIGTERM, _end)
"""So that what runs here ends with a benchmark that is told to end."""


@contextmanager
def running(
    command: Sequence[str | Path],
    log: Path,
    *,
    core: int | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Program]:
    """A program that runs until the block ends; what it says goes to `log`."""
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*pinned, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
    program = Program(process, log)
    try:
        yield program
    finally:
        if process.poll() is None:
            program.stop()
        else:
            note(f"{command[0]} had ended with code {process.returncode}; see {log}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


NGINX = """\
daemon off;
worker_processes 1;
pid {here}/nginx.pid;
error_log {here}/nginx.error.log warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 3600s;
  client_body_buffer_size 64k;
  client_max_body_size 16m;
  client_body_temp_path {here}/body;
  proxy_temp_path {here}/proxy;
  fastcgi_temp_path {here}/fastcgi;
  uwsgi_temp_path {here}/uwsgi;
  scgi_temp_path {here}/scgi;
  default_type application/json;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""
ANSWER = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"expert-0000",'
    '"choices":[{"index":0,"message":{"role":"assistant","content":"A constant reply."},'
    '"logprobs":null,"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":8,"completion_tokens":4,"total_tokens":12}}'
)


@contextmanager
def nginx(here: Path, core: int) -> Iterator[str]:
    """nginx answering every request with the same chat completion; its URL."""
    here = here.resolve()
    here.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = here / "nginx.conf"
    config.write_text(NGINX.format(here=here, port=port, answer=ANSWER))
    with running(["nginx", "-p", here, "-c", config], here / "nginx.log", core=core) as program:
        url = f"http://127.0.0.1:{port}"
        program.wait_answering(url, 10)
        yield url
