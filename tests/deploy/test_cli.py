import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import build_parser, main

COMMAND = Path(sys.executable).with_name("introvert")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@pytest.mark.parametrize(
    "command", ["demo", "fit", "train", "evaluate", "serve", "route", "experts", "keys", "status"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_help_and_version_load_nothing_heavy() -> None:
    heavy = "torch ray transformers faiss fastapi vllm pydantic yaml numpy"
    program = (
        "import sys, deploy.cli\n"
        "try: deploy.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print(sorted(set('{heavy}'.split()) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.stderr.strip() == "[]"


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("introvert ")


def test_no_command_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert "usage: introvert" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "no-such-config"], ["no-such-config", "preset"]),
        (["train", "demo", "--set", "experts.rnk=8"], ["experts.rnk", "did you mean 'rank'"]),
        (["serve", "demo", "--set", "gateway.port=99999"], ["gateway.port", "65535"]),
        (["demo", "--set", "data.train=[mine.jsonl]"], ["data.train", "introvert train"]),
        (["demo", "--set", "base.model=mine"], ["base.model", "introvert train"]),
        (["unknown"], ["unknown"]),
        (
            ["train", "demo", "--only", "expert-0001", "--add-data", "new.jsonl"],
            ["--only", "--add-data", "give one"],
        ),
    ],
)
def test_usage_and_config_errors_exit_with_2(arguments: list[str], words: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", ["serve", "route", "evaluate"])
def test_what_needs_a_bundle_says_how_to_get_one(command: str, tmp_path: Path) -> None:
    extra = ["some text"] if command == "route" else []
    done = run(
        command, "two_gpu", *extra, "--set", f"bundle.path={tmp_path}/b", "--set", "gateway.port=0"
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "introvert train" in done.stderr or "introvert fit" in done.stderr


def test_an_unwritable_report_is_found_before_the_work(tmp_path: Path) -> None:
    done = run("route", "demo", "text", "--report", f"{tmp_path}/no/such/report.json")
    assert done.returncode == 1
    assert "--report" in done.stderr
    assert "not a writable directory" in done.stderr


def test_the_demo_finds_a_taken_port_before_it_does_anything(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("demo", "--once", "--set", f"gateway.port={port}", cwd=tmp_path)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--set gateway.port" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1 8", "nonsense", "http://"])
def test_status_of_no_url_is_one_line(url: str) -> None:
    done = run("status", "--url", url)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "--url" in done.stderr


def test_status_without_an_endpoint_says_so() -> None:
    with socket.socket() as silent:  # bound, so nobody else gets the port, and not listening
        silent.bind(("127.0.0.1", 0))
        done = run("status", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert done.returncode == 1
    assert "introvert serve" in done.stderr


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_signals_end_a_running_command_with_their_own_code(signum: int, code: int) -> None:
    """`status` waits for an endpoint that accepts and never answers, until the signal."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [COMMAND, "status", "--url", url], stderr=subprocess.PIPE, text=True
        )
        try:
            connection, _ = silent.accept()
            process.send_signal(signum)
            _, errors = process.communicate(timeout=60)
            connection.close()
        finally:
            process.kill()
            process.wait()
    assert process.returncode == code
    assert "Traceback" not in errors


def test_main_returns_exit_codes_instead_of_raising(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "no-such-config"]) == 2
    assert "introvert: no-such-config" in capsys.readouterr().err


def test_an_impatient_second_signal_does_not_break_the_clean_up() -> None:
    program = (
        "import os, signal\n"
        "from deploy.cli import handle_signals\n"
        "handle_signals()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('cleaned up')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "cleaned up\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_server_that_waits_ends_in_order(name: str) -> None:
    program = (
        "import os, signal, threading\n"
        "from deploy.cli import handle_signals\n"
        "from deploy.lifetime import until_stopped\n"
        "handle_signals()\n"
        f"threading.Timer(0.2, os.kill, (os.getpid(), signal.{name})).start()\n"
        "until_stopped()\n"
        "print('ended in order')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "ended in order\n"
