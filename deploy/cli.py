"""The `introvert` command: arguments in, one use case called, exit code out.

Imports nothing heavy, so that `introvert --help` answers at once; each command's module is
imported when it runs. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

Command = Callable[[argparse.Namespace], int]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

PATIENCE_S = 60.0
"""Seconds after SIGINT or SIGTERM in which no other is heeded: the clean-up is under way, and an
impatient second Ctrl-C must not break it."""

# Libraries' own bars and banners would break ours.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

EPILOG = """\
CONFIG is a YAML file or the name of a preset: demo, two_gpu, moin_5k.
Exit codes: 0 success, 1 failure, 2 a usage or config error, 130 interrupted, 143 terminated.
"""


class Terminated(BaseException):
    """SIGTERM arrived: unwinds the stack, so that every context manager cleans up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = build_parser().parse_args(arguments)
    handle_signals()
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("introvert: interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except Terminated:
        print("introvert: terminated", file=sys.stderr)  # noqa: T201
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader of our output has gone; nothing may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="introvert",
        description="Many small LoRA experts from one frozen base and a pile of text, "
        "served behind one OpenAI-compatible endpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = _add(commands, "demo", "train experts from nothing, serve them, ask them questions")
    demo.add_argument("--once", action="store_true", help="stop after the questions")
    demo.set_defaults(config="demo")
    _common(demo)

    fit = _add(commands, "fit", "fit the router and write one shard per cluster")
    _config(fit)
    train = _add(commands, "train", "train every cluster's expert and publish the bundle")
    _config(train)
    train.add_argument(
        "--only",
        metavar="EXPERT",
        action="append",
        default=[],
        help="train this expert again, such as expert-0003, and leave all others as they are "
        "(repeatable)",
    )
    train.add_argument(
        "--add-data",
        metavar="PATH",
        action="append",
        default=[],
        help="add the documents of a file, glob, URL or hub data set to the clusters nearest to "
        "them, and train again those experts alone whose clusters grow enough (repeatable)",
    )
    evaluate = _add(commands, "evaluate", "compare base, routed, random, hindsight and one LoRA")
    _config(evaluate)
    evaluate.add_argument(
        "--no-baseline", action="store_true", help="leave out the single LoRA of equal tokens"
    )
    serve = _add(commands, "serve", "bring the workers and the gateway up; Ctrl-C takes them down")
    _config(serve)
    _batch(_add(commands, "batch", "answer a file of requests, each by its expert, none twice"))
    route = _add(commands, "route", "show which expert each text would go to")
    _config(route)
    route.add_argument("texts", metavar="TEXT", nargs="+")

    _experts(_add(commands, "experts", "list, show, withdraw or restore the experts of a bundle"))

    _keys(_add(commands, "keys", "make, list and revoke the API keys of gateway.keys_file"))
    publish = _add(
        commands, "publish", "have a running endpoint serve another bundle, without a pause"
    )
    _publish(publish)

    status = _add(commands, "status", "show what a running endpoint holds")
    _endpoint(status)
    _report(status)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])


def _experts(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, ids, summary in (
        ("list", "*", "a table of all experts, or of those named"),
        ("show", "+", "an expert's card: what it was made from and how well it does"),
        ("withdraw", "+", "take experts out of serving; their clusters go to the base"),
        ("restore", "+", "undo a withdrawal: the gate's decision holds again"),
    ):
        action = _add(actions, name, summary)
        action.add_argument(
            "bundle",
            metavar="CONFIG_OR_BUNDLE",
            help="a YAML file, a preset's name, or a bundle's directory or URL",
        )
        action.add_argument("ids", metavar="ID", nargs=ids, help="such as expert-0003")
        _common(action)


def _keys(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a key: it is printed once, its hash is kept")
    new.add_argument("name", metavar="NAME", help="whose it is: letters, digits, '.', '_', '-'")
    new.add_argument(
        "--experts",
        metavar="ID",
        nargs="+",
        help="experts that it may ask, and `base`; default: all",
    )
    new.add_argument("--requests-per-minute", type=float, metavar="N", help="default: no limit")
    new.add_argument("--concurrent", type=int, metavar="N", help="default: no limit")
    new.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="share of a busy worker; default: 1"
    )
    listing = actions.add_parser("list", help="a table of the keys' names and limits")
    _report(listing)
    revoke = actions.add_parser("revoke", help="take a key away; gateways follow within a second")
    revoke.add_argument("name", metavar="NAME")
    for action in (new, listing, revoke):
        action.add_argument(
            "--file",
            metavar="KEYS",
            default="keys.yaml",
            help="the file that gateway.keys_file names; default: %(default)s",
        )


def _batch(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    parser.add_argument(
        "--input",
        dest="inputs",
        metavar="PATH",
        action="append",
        required=True,
        help="JSONL (also compressed) or Parquet, a glob, a directory or a URL: OpenAI's batch "
        "format, or rows with `prompt` or `messages` (repeatable)",
    )
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="answers: .jsonl or .parquet, path or URL"
    )
    parser.add_argument(
        "--errors", metavar="FILE", help="error lines; default: beside the output, .errors.jsonl"
    )
    parser.add_argument(
        "--url",
        help="ask a running endpoint, at low priority, in place of engines of the job's own; its "
        "API key is taken from INTROVERT_API_KEY",
    )
    parser.add_argument(
        "--concurrency", metavar="N", type=int, default=64, help="with --url; default: %(default)s"
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, help="for lines that do not say")
    parser.add_argument("--temperature", metavar="X", type=float, help="for lines that do not say")
    parser.add_argument("--top-p", metavar="X", type=float, help="for lines that do not say")
    parser.add_argument("--seed", metavar="N", type=int, help="for lines that do not say")
    parser.add_argument(
        "--default",
        dest="defaults",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="any field of a request, for lines that do not set it; VALUE is JSON or a string "
        "(repeatable)",
    )
    parser.add_argument("--in-order", action="store_true", help="write in the input's order")
    parser.add_argument(
        "--fast-routing",
        action="store_true",
        help="take the word of the router's student for every line; embed none",
    )
    parser.add_argument(
        "--work", metavar="DIR", help="where the job keeps its ledger; default: beside the output"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")


def _endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument(
        "--admin-key-file",
        metavar="FILE",
        help="the admin key's file; default: the environment variable INTROVERT_ADMIN_KEY, or the "
        "key that `introvert serve` made on this machine",
    )


def _publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        help="the bundle's directory or URL, beside the one that the endpoint was started with",
    )
    _endpoint(parser)
    parser.add_argument(
        "--canary",
        metavar="SHARE",
        type=float,
        help="have it answer this share of the conversations until it is promoted",
    )
    parser.add_argument("--promote", action="store_true", help="serve the canary")
    parser.add_argument("--abort", action="store_true", help="take the change back")
    _report(parser)


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or a preset's name")
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a config value, such as experts.rank=8 (repeatable)",
    )
    _report(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="write the results as JSON")


def _run(options: argparse.Namespace) -> int:
    from configs.errors import IntrovertError
    from deploy.output import results_alone

    try:
        if options.version:
            from importlib.metadata import version

            print(f"introvert {version('introvert')}")  # noqa: T201
            return 0
        if options.command is None:
            build_parser().print_help(sys.stderr)
            return EXIT_USAGE
        command: Command = importlib.import_module(f"deploy.commands.{options.command}").run
        with results_alone():
            return command(options)
    except IntrovertError as error:
        print(f"introvert: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


def handle_signals() -> None:
    """Have SIGINT and SIGTERM unwind the stack: `KeyboardInterrupt` and `Terminated`."""
    heeded_at = float("-inf")

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal heeded_at
        if time.monotonic() - heeded_at < PATIENCE_S:
            return
        heeded_at = time.monotonic()
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
