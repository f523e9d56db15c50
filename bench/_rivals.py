"""The other gateways, each installed into an environment of its own and started as it advises."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _stand import Program, free_port, running

from deploy.output import note

DEFAULT_DIRECTORY = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "introvert" / "rivals"
)
START_S = 120.0
LITELLM_CONFIG = """\
model_list:
  - model_name: expert-0000
    litellm_params:
      model: openai/expert-0000
      api_base: {upstream}/v1
      api_key: none
litellm_settings:
  telemetry: false
  set_verbose: false
  request_timeout: 600
"""
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # nor has ours keys
    "NO_PROXY": "127.0.0.1",
    "PYTHONPATH": "",
}


@dataclass(frozen=True)
class Rival:
    """Another gateway, installed."""

    key: str
    requirement: str
    command: Callable[[Path, Path, str, int], list[str]]
    """(environment, scratch directory, upstream URL, port) to its command line."""

    def environment(self, directory: Path) -> Path:
        return directory / self.key

    def install(self, directory: Path) -> str:
        """Its version; empty, with a note that says why, where it cannot be had."""
        environment = self.environment(directory)
        python = environment / "bin" / "python"
        name = self.requirement.partition("[")[0]
        ask = f"from importlib.metadata import version; print(version({name!r}))"
        try:
            if not python.is_file():
                note(f"installing {self.requirement} into {environment}")
                subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            there = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
            if there.returncode:
                install = [str(python), "-m", "pip", "install", "--quiet", self.requirement]
                subprocess.run(
                    install, check=True, timeout=900, stdout=sys.stderr, stderr=subprocess.DEVNULL
                )
                there = subprocess.run(
                    [python, "-c", ask], capture_output=True, text=True, check=True
                )
        except (OSError, subprocess.SubprocessError) as error:
            note(
                f"{self.requirement} cannot be installed ({error}): it is left out, and the "
                f"figures against it count as missed. Install it into {environment} yourself, or "
                "name a directory where it is with --rivals."
            )
            return ""
        return there.stdout.strip()

    @contextmanager
    def serving(
        self, directory: Path, scratch: Path, upstream: str, core: int, probe: bytes
    ) -> Iterator[tuple[Program, str]]:
        """The program and its URL, in front of `upstream` and once it has answered `probe`."""
        port = free_port()
        command = self.command(self.environment(directory), scratch, upstream, port)
        log = scratch / f"{self.key}.log"
        with running(command, log, core=core, env=QUIET) as program:
            url = f"http://127.0.0.1:{port}"
            program.wait_answering(f"{url}/v1/chat/completions", START_S, probe)
            yield program, url


def _litellm(environment: Path, scratch: Path, upstream: str, port: int) -> list[str]:
    config = scratch / "litellm.yaml"
    config.write_text(LITELLM_CONFIG.format(upstream=upstream))
    program = str(environment / "bin" / "litellm")
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [program, "--config", str(config), *where, "--num_workers", "1"]


def _vllm_router(environment: Path, scratch: Path, upstream: str, port: int) -> list[str]:
    program = str(environment / "bin" / "vllm-router")
    where = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    work = ["--worker-urls", upstream, "--policy", "round_robin", "--log-level", "error"]
    return [program, *where, *work]


LITELLM = Rival("litellm", "litellm[proxy]", _litellm)
VLLM_ROUTER = Rival("vllm-router", "vllm-router", _vllm_router)
