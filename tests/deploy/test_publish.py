from __future__ import annotations

from typing import Any

import pytest

from deploy.cli import main
from deploy.commands import publish
from deploy.endpoint import EndpointError

CHANGE: dict[str, Any] = {
    "bundle": "b" * 12,
    "place": "/bundles/next",
    "state": "loading",
    "share": 0.0,
    "verified": 0,
    "total": 2,
    "refused": {},
    "detail": "",
    "took_s": 1.0,
}


class FakeEndpoint:
    """Answers with one change after the other; none: it does not answer."""

    def __init__(self, *changes: dict[str, Any] | None) -> None:
        self.changes = list(changes)
        self.calls: list[tuple[str, str, Any]] = []

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        self.calls.append((method, path, body))
        if method == "POST":
            return CHANGE
        news = self.changes.pop(0)
        if news is None:
            raise EndpointError("it does not answer")
        return {"current": {}, "change": CHANGE | news}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> FakeEndpoint:
    fake = FakeEndpoint()
    monkeypatch.setattr(publish.Endpoint, "of", lambda options: fake)
    monkeypatch.setattr(publish, "POLL_S", 0.0)
    return fake


def test_progress_goes_to_stderr_and_the_outcome_to_stdout(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.changes = [{}, {"verified": 1}, None, {"verified": 2, "state": "done"}]
    assert main(["publish", "/bundles/next"]) == 0
    output, errors = capsys.readouterr()
    assert output == "bundle bbbbbbbbbbbb is served (1.0 s)\n"
    assert errors.splitlines() == [
        "  loading 0/2 verified",
        "  loading 1/2 verified",
        "  done 2/2 verified",
    ]
    body = {"path": "/bundles/next", "canary": None}
    assert endpoint.calls[0] == ("POST", "/admin/bundle", body)


def test_refused_experts_are_named_with_their_reasons(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"expert-0001@abc": "adapter_model.safetensors is truncated"}
    endpoint.changes = [{"state": "refused", "refused": refused, "detail": "1 of 2 experts"}]
    assert main(["publish", "/bundles/next"]) == 1
    output = capsys.readouterr().out
    assert "expert-0001@abc: adapter_model.safetensors is truncated" in output
    assert "is refused: 1 of 2 experts" in output


def test_a_live_canary_is_a_success_and_its_promotion_is_followed(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.changes = [{}, {"state": "canary", "share": 0.1}]
    assert main(["publish", "/bundles/next", "--canary", "0.1"]) == 0
    assert "answers 10% of the conversations" in capsys.readouterr().out
    endpoint.changes = [{"state": "canary", "share": 0.1}, {"state": "draining"}, {"state": "done"}]
    assert main(["publish", "--promote"]) == 0
    assert ("POST", "/admin/bundle/promote", None) in endpoint.calls


def test_an_abort_succeeds_when_it_is_aborted(endpoint: FakeEndpoint) -> None:
    endpoint.changes = [{"state": "aborted"}]
    assert main(["publish", "--abort"]) == 0
    assert endpoint.calls[0] == ("POST", "/admin/bundle/abort", None)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["/b", "--promote"],
        ["--promote", "--abort"],
        ["/b", "--canary", "1.5"],
        ["--promote", "--canary", "0.5"],
    ],
)
def test_a_command_that_contradicts_itself_is_a_usage_error(
    endpoint: FakeEndpoint, arguments: list[str]
) -> None:
    assert main(["publish", *arguments]) == 2
    assert endpoint.calls == []
