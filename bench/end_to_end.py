"""The main job end to end: how long the demo takes, what it holds, how it heals and how it ends.

Runs `introvert demo` as a user would, in a directory of its own, and watches it from outside.
The first start makes everything; the second finds the stages finished. Between, an engine is
killed while requests keep coming. `--quick` starts only once, on what an earlier run has made
(so run it once without).

    .venv/bin/python bench/end_to_end.py --report runs/bench/end_to_end.json
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
from _report import Report, parser

from deploy.output import note
from server.table import RoutingTable

WORK = Path("runs/bench/end_to_end")
PORT = 8091
COMMAND = str(Path(sys.executable).with_name("introvert"))
QUESTION = "How do I merge two tables?"
GIB = 2**30


@dataclass
class Demo:
    """One running `introvert demo`, watched."""

    process: subprocess.Popen[str]
    started: float
    peak_bytes: int = 0
    ready_after: float = 0.0
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    @classmethod
    def start(cls) -> Demo:
        process = subprocess.Popen(
            [COMMAND, "demo", "--set", f"gateway.port={PORT}", "--report", "report.json"],
            cwd=WORK,
            stdout=subprocess.PIPE,
            stderr=(WORK / "demo.log").open("w"),
            text=True,
        )
        demo = cls(process, time.monotonic())
        threading.Thread(target=demo._watch, daemon=True).start()
        return demo

    def wait_answering(self) -> None:
        """Until the demo has asked its questions and says that it stays up."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            sys.stderr.write(line)
            if "Ctrl-C" in line:
                self.ready_after = time.monotonic() - self.started
                return
        raise SystemExit(f"the demo ended early; see {WORK / 'demo.log'}")

    def stop(self, signum: int) -> float:
        """Seconds from the signal to the end."""
        asked = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(timeout=120)
        return time.monotonic() - asked

    def survivors(self) -> int:
        """Processes that the demo started and that outlive it."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            alive = [p for p in self.seen.values() if p.is_running() and p.status() != "zombie"]
            if not alive:
                return 0
            time.sleep(0.2)
        return len(alive)

    def _watch(self) -> None:
        """Follow the tree: who was ever in it, and the most memory it held (PSS)."""
        root = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            total = 0
            for process in tree(root):
                self.seen.setdefault(process.pid, process)
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(1.0)


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and everything below it; empty when it has gone."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def table(url: str) -> RoutingTable:
    import urllib.request

    with urllib.request.urlopen(f"{url}/admin/status", timeout=5) as answer:
        return RoutingTable.model_validate(json.load(answer)["table"])


def heal(url: str, report: Report) -> None:
    """SIGKILL one engine; ask the other experts meanwhile, and its own until they answer."""
    before = table(url)
    dead = next(worker for worker in before.workers if worker.experts and worker.pid)
    theirs = [home.id for home in before.experts if dead.id in home.workers]
    others = [home.id for home in before.experts if dead.id not in home.workers]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
    answered: list[bool] = []
    healed = threading.Event()

    def ask(model: str) -> bool:
        try:
            client.completions.create(model=model, prompt=QUESTION, max_tokens=4)
        except openai.OpenAIError:
            return False
        return True

    def keep_asking() -> None:
        turn = 0
        while not healed.is_set():
            answered.append(ask(others[turn % len(others)]))
            turn += 1

    assert dead.pid is not None
    os.kill(dead.pid, signal.SIGKILL)
    killed = time.monotonic()
    asking = threading.Thread(target=keep_asking)
    asking.start()
    while not all(ask(model) for model in theirs) and time.monotonic() - killed < 180:
        time.sleep(0.25)
    report.add("heal_seconds", time.monotonic() - killed, "s", "<= 60")
    healed.set()
    asking.join()
    report.add("others_answers_meanwhile", len(answered), "answers", "> 0")
    report.add("others_errors_meanwhile", answered.count(False), "errors", "== 0")


def help_seconds() -> float:
    def once() -> float:
        started = time.monotonic()
        subprocess.run([COMMAND, "--help"], check=True, capture_output=True)
        return time.monotonic() - started

    return statistics.median(once() for _ in range(5))


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    report = Report("end_to_end")
    WORK.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{PORT}"
    report.add("help_seconds", help_seconds(), "s", "< 0.5")
    if not options.quick:
        subprocess.run(["rm", "-rf", str(WORK / "runs")], check=True)
        first = Demo.start()
        first.wait_answering()
        report.add("first_start_seconds", first.ready_after, "s", "<= 600")
        report.add("first_start_peak_memory", first.peak_bytes / GIB, "GiB", "<= 12")
        report.add("sigterm_end_seconds", first.stop(signal.SIGTERM), "s")
        report.add("left_after_sigterm", first.survivors(), "processes", "== 0")
        quality(report)
    elif not (WORK / "runs" / "demo" / "evaluation.stage.json").is_file():
        note("nothing made yet: run without --quick first; only the command line was measured")
        return report.close(options.report)
    second = Demo.start()
    second.wait_answering()
    report.add("second_start_seconds", second.ready_after, "s", "<= 90")
    heal(url, report)
    report.add("second_start_peak_memory", second.peak_bytes / GIB, "GiB", "<= 12")
    report.add("sigint_end_seconds", second.stop(signal.SIGINT), "s")
    report.add("left_after_sigint", second.survivors(), "processes", "== 0")
    return report.close(options.report)


def quality(report: Report) -> None:
    """The demo's own report: perplexities on held-out text."""
    perplexity = json.loads((WORK / "report.json").read_text())["perplexity"]
    report.add("perplexity_base", perplexity["base"], "")
    report.add("perplexity_routed", perplexity["routed"], "", f"< {perplexity['base']:.4f}")
    report.add("perplexity_random", perplexity["random"], "", f"> {perplexity['routed']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
