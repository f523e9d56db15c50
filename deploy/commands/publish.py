"""`introvert publish`: a bundle takes the place of the served one, without a pause.

Speaks to the admin route of a running endpoint; what happens there is `server.control.publisher`'s.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Protocol

from configs.errors import IntrovertError
from deploy.endpoint import Endpoint, EndpointError
from deploy.output import check_report, note, say, write_report

ROUTE = "/admin/bundle"
POLL_S = 0.25
PATIENCE_S = 60.0
"""Seconds without an answer after which the endpoint counts as gone: its control plane may be
starting again."""
OVER = ("done", "refused", "aborted")


class PublishUsageError(IntrovertError):
    """A command that contradicts itself."""

    exit_code = 2


class Caller(Protocol):
    """An endpoint as far as this command needs it."""

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Its answer; `EndpointError` if there is none."""
        ...


def run(options: argparse.Namespace) -> int:
    """Publish, promote or abort; 0 when the bundle is served, or its canary live."""
    check_report(options.report)
    _check(options)
    endpoint = Endpoint.of(options)
    if options.abort or options.promote:
        endpoint.call("POST", f"{ROUTE}/{'abort' if options.abort else 'promote'}")
    else:
        asked = {"path": _place(options.bundle), "canary": options.canary}
        endpoint.call("POST", ROUTE, asked)
    change = follow(endpoint, stop_at_canary=not (options.promote or options.abort))
    write_report(options.report, change)
    _say(change)
    wanted = ("aborted",) if options.abort else ("done", "canary")
    return 0 if change["state"] in wanted else 1


def follow(endpoint: Caller, *, stop_at_canary: bool) -> dict[str, Any]:
    """Show a change on stderr until it is over, or its canary is live; return it.

    Raises:
        EndpointError: nobody answers any more, or nobody knows of a change.
    """
    shown, heard = "", time.monotonic()
    while True:
        try:
            change = endpoint.call("GET", ROUTE)["change"]
            heard = time.monotonic()
        except EndpointError:
            if time.monotonic() - heard > PATIENCE_S:
                raise
            time.sleep(POLL_S)
            continue
        if change is None:
            raise EndpointError("the endpoint knows of no change; publish the bundle again")
        line = _line(change)
        if line != shown:
            note(line)
            shown = line
        if change["state"] in OVER or (stop_at_canary and change["state"] == "canary"):
            found: dict[str, Any] = change
            return found
        time.sleep(POLL_S)


def _check(options: argparse.Namespace) -> None:
    if sum((bool(options.bundle), options.promote, options.abort)) != 1:
        raise PublishUsageError("give one of BUNDLE, --promote and --abort")
    if options.canary is not None and not (options.bundle and 0 < options.canary < 1):
        raise PublishUsageError("--canary takes a share between 0 and 1, together with a BUNDLE")


def _place(bundle: str) -> str:
    """As the endpoint knows it, which may run in another directory."""
    return bundle if "://" in bundle else str(Path(bundle).resolve())


def _line(change: dict[str, Any]) -> str:
    counts = f" {change['verified']}/{change['total']} verified" if change["total"] else ""
    share = f" {change['share']:.0%} of the conversations" if change["state"] == "canary" else ""
    refused = f", {len(change['refused'])} refused" if change["refused"] else ""
    detail = f" ({change['detail']})" if change["detail"] else ""
    return f"  {change['state']}{share}{counts}{refused}{detail}"


def _say(change: dict[str, Any]) -> None:
    name = f"bundle {change['bundle'] or change['place']}"
    outcome = {
        "done": f"{name} is served",
        "canary": f"{name} answers {change['share']:.0%} of the conversations; "
        "`introvert publish --promote` or `--abort` ends that",
        "refused": f"{name} is refused: {change['detail']}",
        "aborted": f"{name} is not served: {change['detail']}",
    }[change["state"]]
    say(f"{outcome} ({change['took_s']:.1f} s)")
    for expert, reason in sorted(change["refused"].items()):
        say(f"  {expert}: {reason}")
