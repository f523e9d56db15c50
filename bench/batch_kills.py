"""A batch that is killed at random moments, part by part: what it costs.

`introvert batch` on two real engines of its own, greedy, undisturbed once. Then the same input
again, with SIGKILL at moments that are drawn by lot, in turn of: the command itself, after which
the same command is given again at once; an engine; the actor that keeps an engine; Ray's head.
Last, unless `--quick`, with a part of the input, on a Ray cluster of three nodes of this machine, a
whole node with an engine and all that runs there, which nobody replaces.

Of every line there must be one answer in the end, and the very one that it had undisturbed. What a
kill may cost is work: a line that was answered and not written down yet is answered again.

A sum of floats depends on how many lines are computed together, so a greedy answer is only sure
where the two best tokens are never closer than rounding moves them. Lines whose undisturbed answer
has two closer than `CLOSE` are left out of what is compared, and counted; how close the others come
and how far log-probabilities moved is told.

    .venv/bin/python bench/batch_kills.py [--quick] [--report FILE] [--kills N] [--seed S]
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _report import Report, parser
from _served import MARK, made_world
from faults import alive, three_nodes

from deploy.output import note, say, table
from tests.end_to_end.conftest import EXPERTS, FORMS, INTROVERT, TOPICS, World

WORK = Path("runs/bench/batch_kills")
TURNS = ("command", "engine", "actor", "command", "engine", "ray_head")
"""What is killed, again and again from the beginning."""
NODE = "node"
KILLS = 10
QUICK_KILLS = 3
LINES = 4800
QUICK_LINES = 1000
NODE_SHARE = 4
"""So many times fewer lines for the batch that loses a node."""
TOKENS = 24
CLOSE = 1e-4
"""In nats."""
SOON = 0.3
"""Share of kills that come some seconds after the one before, whatever is under way then; the
others wait for lines that are answered since."""
SOON_S = 12.0
LONGEST_S = 600.0
"""Without any kill or end."""
GONE_S = 60.0
"""For what was killed with no time to end its children."""


def made_lines(count: int) -> list[dict[str, Any]]:
    """Requests in OpenAI's batch format, for each expert and for whom the router finds."""
    things = [thing for topic in TOPICS for thing in topic]
    models = ["introvert", *(f"expert-{number:04}" for number in range(EXPERTS))]
    found = []
    for number in range(count):
        text = f"{FORMS[number % len(FORMS)]} {things[number % len(things)]}, number {number}"
        body = {
            "model": models[number % len(models)],
            "messages": [{"role": "user", "content": text}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 2,
        }
        found.append({"custom_id": f"n{number}", "method": "POST", "url": "/v1/chat/completions"})
        found[-1]["body"] = body
    random.Random(1).shuffle(found)
    return found


@dataclass
class Job:
    """One batch and the processes that work on it."""

    world: World
    here: Path
    """Its own directory."""
    lines: Sequence[dict[str, Any]]
    env: dict[str, str] = field(default_factory=dict)
    """More environment variables; one named as `MARK` marks processes beside its own."""
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        self.env = {MARK: uuid.uuid4().hex, **self.env}
        source = self.here / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        serving = {"engine_args": {"enable-log-requests": True, "enable-log-outputs": True}}
        config = self.world.config(self.here / "work", serving=serving)
        (self.here / "config.json").write_text(config.model_dump_json())

    def start(self) -> None:
        """Give the command."""
        words = [INTROVERT, "batch", self.here / "config.json", "--input", self.here / "in.jsonl"]
        words += ["--output", self.here / "out.jsonl"]
        with (self.here / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.env},
            )

    @property
    def code(self) -> int | None:
        """With what the command has ended, if it has."""
        assert self.process, "it has been started"
        return self.process.poll()

    def wait(self) -> int:
        """Until the command has ended; its exit code."""
        assert self.process, "it has been started"
        return self.process.wait(LONGEST_S)

    def done(self) -> int:
        """Lines that are written down as done."""
        ledger = self.here / "out.jsonl.work" / "ledger.sqlite"
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db,
        ):
            return int(db.execute("SELECT COUNT(*) FROM results").fetchone()[0])
        return 0

    def processes(self) -> list[psutil.Process]:
        """All that it has started, wherever in the system's tree they are now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.env[MARK] and alive(process):
                    found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        files = (self.here / "work" / "logs").glob("worker-*.pid")
        pids = set()
        for file in files:
            with suppress(OSError, ValueError):
                pids.add(int(file.read_text()))
        return [process for process in self.processes() if process.pid in pids]

    def titled(self, title: str) -> list[psutil.Process]:
        """Those whose command line begins so."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error, IndexError):
                if Path(process.cmdline()[0]).name.startswith(title):
                    found.append(process)
        return found

    def victims(self, part: str, random_: random.Random) -> list[psutil.Process]:
        """What dies with one of the parts of that kind; empty where there is none just now."""
        if part == "command":
            assert self.process, "it has been started"
            return [psutil.Process(self.process.pid)]
        if part == "engine":
            there = self.engines()
        elif part == "ray_head":
            there = self.titled("gcs_server")
        else:
            there = self.titled("ray::Worker")
        if not there:
            return []
        chosen = random_.choice(sorted(there, key=lambda process: process.pid))
        if part != NODE:
            return [chosen]
        with suppress(psutil.Error):
            if (raylet := chosen.parent()) is not None:
                return [raylet, *raylet.children(recursive=True)]
        return []

    def said_by_engines(self, words: str) -> int:
        """Lines of the engines' logs that hold such words."""
        logs = (self.here / "work" / "logs").glob("worker-*.log")
        return sum(log.read_bytes().count(words.encode()) for log in logs)

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.here / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def job_of(
    world: World, here: Path, lines: Sequence[dict[str, Any]], env: dict[str, str] | None = None
) -> Iterator[Job]:
    """A job whose command has ended when the block has, whatever happens in it."""
    job = Job(world, here, lines, dict(env or {}))
    try:
        yield job
    finally:
        if job.process is not None:
            job.process.kill()
            job.process.wait()


@dataclass
class Storm:
    """The killing of one job's parts, one after the other, until it is over."""

    job: Job
    random_: random.Random
    rows: list[list[object]] = field(default_factory=list)
    """Part, seconds since the beginning, lines done then."""
    early: int = 0
    """Times that the command ended by itself without having done its work."""

    def run(self, parts: Sequence[str]) -> float:
        """All of it; seconds that it took."""
        began = time.monotonic()
        self.job.start()
        for number, part in enumerate(parts):
            if not self._await_moment(len(parts) - number):
                note("  the batch was over before all kills were done")
                break
            if not self._kill(part):
                break
            at = time.monotonic() - began
            self.rows.append([part, at, self.job.done()])
            note(f"  {at:6.1f} s: killed {part}, {self.job.done()} lines done")
        while self.job.wait() and self.early < 3:
            self._again()
        return time.monotonic() - began

    def _again(self) -> None:
        self.early += 1
        note(f"  the command ended with code {self.job.code}; see {self.job.here / 'log'}")
        self.job.start()

    def _await_moment(self, left: int) -> bool:
        """Until it is time for the next kill; false if the job is over before."""
        before = self.job.done()
        share = self.random_.random() * (len(self.job.lines) - before) / (left + 1)
        soon, seconds = self.random_.random() < SOON, self.random_.uniform(0, SOON_S)
        began = time.monotonic()
        while self.job.done() - before <= share:
            waited = time.monotonic() - began
            if soon and waited > seconds:
                break
            assert waited < LONGEST_S, "no line is answered any more"
            if self.job.code == 0:
                return False
            if self.job.code is not None:
                self._again()
            time.sleep(0.05)
        return True

    def _kill(self, part: str) -> bool:
        began = time.monotonic()
        while not (victims := self.job.victims(part, self.random_)):
            if self.job.code == 0:
                return False
            assert time.monotonic() - began < LONGEST_S, f"there is no {part} to be killed"
            time.sleep(0.02)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        if part == "command":
            self.job.wait()
            self.job.start()
        return True


def judge(report: Report, key: str, job: Job, calm: Sequence[dict[str, Any]]) -> None:
    """Compare the job's lines with those that were answered undisturbed."""
    answers, errors = job.rows("out.jsonl"), job.rows("out.errors.jsonl")
    times = Counter(row["custom_id"] for row in (*answers, *errors))
    wanted = {line["custom_id"] for line in job.lines}
    before = {row["custom_id"]: row for row in calm}
    report.add(f"{key}lines", len(wanted), "lines")
    report.add(f"{key}lines_missing", len(wanted - times.keys()), "lines", "== 0")
    report.add(f"{key}lines_twice", sum(times.values()) - len(times), "lines", "== 0")
    report.add(f"{key}error_lines", len(errors), "lines", "== 0")
    different, gaps, shift = 0, [math.inf], 0.0
    for row in answers:
        was = before[row["custom_id"]]
        if outcome(row) != outcome(was):
            different += 1
        for old, new in zip(tokens(was), tokens(row), strict=True):
            if old["token"] != new["token"]:
                note(f"  {row['custom_id']}: two tokens {gap(old):.2e} nats apart changed places")
                break
            gaps.append(gap(old))
            shift = max(shift, abs(old["logprob"] - new["logprob"]))
    report.add(f"{key}answers_different", different, "lines", "== 0")
    report.add(f"{key}closest_two_tokens", 1e6 * min(gaps), "nats / 1e6")
    report.add(f"{key}largest_shift", 1e6 * shift, "nats / 1e6")
    # an engine's log leaves out answers without a character
    answered = job.said_by_engines("Generated response chatcmpl-")
    spoken = sum(any(outcome(row)[-1]) for row in answers)
    report.add(f"{key}answered_again", answered - spoken, "lines")
    begun = job.said_by_engines("Received request chatcmpl-")
    report.add(f"{key}begun_again", begun - len(wanted), "lines")


def outcome(row: dict[str, Any]) -> tuple[str, str, list[str]]:
    """Who answered, and what."""
    body = row["response"]["body"]
    by = f"{row['introvert']['expert']}@{row['introvert']['version']}"
    return body["model"], by, [choice["message"]["content"] for choice in body["choices"]]


def tokens(row: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = row["response"]["body"]["choices"][0]["logprobs"]["content"]
    return found


def gap(token: dict[str, Any]) -> float:
    """How much likelier the best token was than the next, in nats."""
    first, second = (entry["logprob"] for entry in token["top_logprobs"][:2])
    return float(first - second)


def left_behind(report: Report, key: str, job: Job, *, seconds: float) -> None:
    """Processes that are still there after so many seconds at the most."""
    deadline = time.monotonic() + seconds
    while (left := job.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        with suppress(psutil.Error):
            note(f"  left behind: {process.pid} {' '.join(process.cmdline())[:100]}")
    report.add(f"{key}left_behind", len(left), "processes", "== 0")


def undisturbed(report: Report, world: World, here: Path, count: int) -> list[dict[str, Any]]:
    """What is answered where nothing is killed."""
    with job_of(world, here / "calm", made_lines(count)) as job:
        began = time.monotonic()
        job.start()
        if job.wait():
            raise SystemExit(f"the undisturbed batch failed; see {job.here / 'log'}")
        report.add("undisturbed_s", time.monotonic() - began, "s")
        rows = job.rows("out.jsonl")
        assert len(rows) == count, "every line has an answer"
        left_behind(report, "undisturbed_", job, seconds=0.0)
    return rows


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--kills", type=int)
    arguments.add_argument("--lines", type=int)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    kills = options.kills or (QUICK_KILLS if options.quick else KILLS)
    count = options.lines or (QUICK_LINES if options.quick else LINES)
    parts = [TURNS[number % len(TURNS)] for number in range(kills - (not options.quick))]
    random_ = random.Random(options.seed)
    report = Report("batch_kills")
    here = WORK.resolve()
    world = made_world(here)
    calm = undisturbed(report, world, here, count)
    sure = {row["custom_id"] for row in calm if min(map(gap, tokens(row))) > CLOSE}
    report.add("lines_too_close", count - len(sure), "lines")
    lines = [line for line in made_lines(count) if line["custom_id"] in sure]
    rows: list[list[object]] = []
    early = 0
    with job_of(world, here / "stormy", lines) as job:
        storm = Storm(job, random_)
        report.add("seconds", storm.run(parts), "s")
        left_behind(report, "", job, seconds=GONE_S)
        judge(report, "", job, calm)
        rows += storm.rows
        early += storm.early
    if not options.quick:
        part = lines[: len(lines) // NODE_SHARE]
        with three_nodes() as env, job_of(world, here / "node", part, env) as job:
            storm = Storm(job, random_)
            report.add("node_seconds", storm.run([NODE]), "s")
            working = [*job.engines(), *job.titled("ray::Worker"), *job.titled("ray::Controller")]
            judge(report, "node_", job, calm)
        report.add("node_left_working", len(working), "processes", "== 0")
        left_behind(report, "node_", job, seconds=GONE_S)
        rows += storm.rows
        early += storm.early
    report.add("kills", len(rows), "kills", f"== {kills}")
    report.add("ended_early", early, "commands", "== 0")
    say(table(["killed", "at s", "lines done"], rows))
    report.conditions |= {"seed": options.seed, "tokens": TOKENS, "lines": count}
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
