"""All of it as a user has it: `introvert serve` on real engines, asked with the official client.

One server for all tests, so the order counts: the last two hurt it, and end it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

READY_S = 400.0
HEAL_S = 240.0
CLEAR_S = 30.0
"""For an error to come where a hang might be; how soon it does is for `bench/` to measure."""
DRAIN_S = 60.0
"""For the answer that Ctrl-C finds under way: on a busy machine it took longer than the default."""
BODY_LIMIT = 100_000
BASE = "tiny"
EXPERTS = ["expert-0000", "expert-0001", "expert-0002"]
PROMPT = "once upon a time"
CHAT = [{"role": "user", "content": "how are you?"}]
UNSEEN = (
    "which herbs go well with a roasted chicken?",
    "how do I sort a dictionary in Python?",
    "how many moons does Jupiter have?",
)
"""A question for each of the world's topics."""
GREEDY: dict[str, Any] = {
    "temperature": 0,
    "max_tokens": 12,
    "extra_body": {"ignore_eos": True},
}
LONG: dict[str, Any] = {**GREEDY, "temperature": 1, "max_tokens": 200, "n": 16}
"""An answer that takes seconds."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


def call(url: str, body: bytes | dict[str, Any] | None = None) -> Reply:
    """GET, or POST where there is a body; error answers are answers."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        answer = urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(answer.status, headers, answer.read())


@pytest.fixture(scope="module")
def served(
    world: Any,
    serve: Callable[..., Any],
    left_behind: Callable[[], list[str]],
    ftp: Callable[[Path], AbstractContextManager[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A server of the bundle behind an FTP URL; other tests serve it from its directory."""
    work = tmp_path_factory.mktemp("work")
    with ftp(world.bundle.parent) as url:
        bundle = {"path": f"{url}/{world.bundle.name}", "work_dir": str(work)}
        config = world.config(
            work,
            bundle=bundle,
            gateway={
                "max_body_bytes": BODY_LIMIT,
                "queue_timeout_s": 0.5,
                "drain_timeout_s": DRAIN_S,
            },
            serving={"move_after_s": 600},  # the experts of a lost engine wait for it here
        )
        command = serve(config, work)
        try:
            command.wait_ready(READY_S)
            print(f"\nready in {command.seconds_to_ready:.1f} s")
            yield command
        finally:
            command.close()


@pytest.fixture(scope="module")
def client(served: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def table_of(served: Any) -> dict[str, Any]:
    table: dict[str, Any] = call(f"{served.url}/admin/status").json["table"]
    return table


def served_names(served: Any) -> dict[str, str]:
    return {expert["id"]: expert["served_name"] for expert in table_of(served)["experts"]}


def test_it_says_ready_when_it_is(served: Any) -> None:
    ready = call(f"{served.url}/ready")
    assert ready.status == 200, ready.json
    assert (ready.json["experts_ready"], ready.json["workers_ready"]) == (3, 2)
    assert not ready.json["degraded"]
    assert call(f"{served.url}/health").json == {"status": "ok"}


def test_what_it_needs_was_copied_and_the_password_is_nowhere(served: Any, world: Any) -> None:
    published = [path.relative_to(world.bundle) for path in world.bundle.rglob("*.safetensors")]
    (copies,) = (served.work / "copies").iterdir()
    for name in published:
        assert (copies / name).read_bytes() == (world.bundle / name).read_bytes()
    assert len(published) > len(EXPERTS), "the router is among them"
    told = [path.read_text() for path in (served.work / "logs").iterdir()]
    told += [served.output, served.errors, call(f"{served.url}/admin/status").body.decode()]
    assert not [text for text in told if "open-sesame" in text]


def test_every_model_is_listed(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert sorted(models) == sorted(["introvert", BASE, *EXPERTS])
    assert client.models.retrieve(EXPERTS[1]) == models[EXPERTS[1]]


def test_completions_streamed_and_whole_are_alike(client: openai.OpenAI) -> None:
    request = {**GREEDY, "model": EXPERTS[0], "prompt": PROMPT}
    whole = client.completions.create(**request)
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 3
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]
    assert {chunk.model for chunk in chunks} == {whole.model}


def test_chats_streamed_and_whole_are_alike(client: openai.OpenAI) -> None:
    request = {**GREEDY, "model": EXPERTS[0], "messages": CHAT}
    whole = client.chat.completions.create(**request)
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]


def test_several_choices_a_seed_and_a_stop(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        answer = client.completions.create(
            model=EXPERTS[1], prompt=PROMPT, **{**GREEDY, "temperature": 1, **options}
        )
        return [choice.text for choice in answer.choices]

    three = texts(n=3, seed=7)
    assert len(set(three)) == 3
    assert texts(n=3, seed=7) == three
    assert texts(n=3, seed=8) != three
    (text,) = texts(seed=7, max_tokens=60)
    stop = next(letter for letter in text[1:] if letter.isascii() and letter not in text[0])
    assert texts(seed=7, max_tokens=60, stop=stop) == [text[: text.index(stop)]]


def test_logprobs(client: openai.OpenAI) -> None:
    by_id = {"ignore_eos": True, "return_tokens_as_token_ids": True}  # some tokens look the same
    request = {**GREEDY, "model": EXPERTS[2], "extra_body": by_id}
    plain = client.completions.create(**request, prompt=PROMPT, logprobs=3).choices[0].logprobs
    assert len(plain.token_logprobs) == len(plain.top_logprobs) == 12
    for chosen, candidates in zip(plain.token_logprobs, plain.top_logprobs, strict=True):
        assert len(candidates) == 3
        assert max(candidates.values()) == chosen <= 0
    chat = client.chat.completions.create(**request, messages=CHAT, logprobs=True, top_logprobs=2)
    assert len(chat.choices[0].logprobs.content) == 12
    for token in chat.choices[0].logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob


def test_each_name_is_answered_by_whom_it_names(served: Any, client: openai.OpenAI) -> None:
    names = {**served_names(served), BASE: BASE}
    answers = {}
    for model, served_name in names.items():
        raw = client.completions.with_raw_response.create(
            **GREEDY, model=model, prompt=PROMPT, logprobs=1
        )
        completion = raw.parse()
        version = served_name.partition("@")[2] or "none"
        assert completion.model == served_name
        assert raw.headers["x-introvert-expert"] == ("base" if model == BASE else model)
        assert raw.headers["x-introvert-expert-version"] == version
        assert raw.headers["x-introvert-worker"] in {"worker-0", "worker-1"}
        assert raw.headers["x-introvert-route-score"] == "nan"
        answers[model] = (completion.choices[0].text, completion.choices[0].logprobs.token_logprobs)
    texts, logprobs = zip(*answers.values(), strict=True)
    assert len(set(texts)) == 4, "experts and base really differ"
    assert len({tuple(values) for values in logprobs}) == 4
    pinned = client.completions.create(**GREEDY, model=names[EXPERTS[0]], prompt=PROMPT)
    assert pinned.choices[0].text == answers[EXPERTS[0]][0], "also by the name with its version"


def test_introvert_routes_by_meaning(
    served: Any, client: openai.OpenAI, introvert: Callable[..., Any]
) -> None:
    names, homes = served_names(served), {}
    for worker in table_of(served)["workers"]:
        homes |= dict.fromkeys(worker["experts"], worker["id"])
    asked = []
    for question in UNSEEN:
        raw = client.chat.completions.with_raw_response.create(
            **GREEDY, model="introvert", messages=[{"role": "user", "content": question}]
        )
        expert = raw.headers["x-introvert-expert"]
        assert raw.parse().model == names[expert]
        assert raw.headers["x-introvert-expert-version"] == names[expert].partition("@")[2]
        assert raw.headers["x-introvert-worker"] == homes[names[expert]]
        assert 0.2 < float(raw.headers["x-introvert-route-score"]) <= 1
        assert 0 < float(raw.headers["x-introvert-route-ms"]) < 5000
        asked.append((expert, float(raw.headers["x-introvert-route-score"])))
    assert sorted(expert for expert, _ in asked) == EXPERTS, "to each topic its expert"
    explained = call(f"{served.url}/v1/route", {"input": list(UNSEEN)}).json["data"]
    command = introvert("route", served.work / "config.yaml", *UNSEEN)
    assert command.returncode == 0, command.stderr
    routes = [json.loads(line) for line in command.stdout.splitlines()]
    for (expert, score), explanation, route in zip(asked, explained, routes, strict=True):
        assert explanation["expert"] == route["expert"] == expert
        assert explanation["model"] == names[expert]
        assert explanation["score"] == pytest.approx(score, abs=1e-3)
        assert route["score"] == pytest.approx(score, abs=1e-3)
        assert explanation["candidates"][0]["expert"] == expert


def test_responses_and_messages(served: Any, client: openai.OpenAI) -> None:
    name = served_names(served)[EXPERTS[0]]
    response = client.responses.create(model=EXPERTS[0], input=CHAT, max_output_tokens=8)
    assert response.model == name
    assert 1 <= response.usage.output_tokens <= 8
    message = call(
        f"{served.url}/v1/messages", {"model": EXPERTS[0], "messages": CHAT, "max_tokens": 8}
    )
    assert message.status == 200, message.json
    assert message.json["model"] == name
    assert message.json["type"] == "message"
    assert 1 <= message.json["usage"]["output_tokens"] <= 8


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for model in ("gpt-4", "expert-0003", f"{EXPERTS[0]}@000000000000"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model=model, messages=CHAT)
        assert refused.value.code == "model_not_found"
        assert model in refused.value.message


@pytest.mark.parametrize("model", [EXPERTS[0], "introvert"])
@pytest.mark.parametrize(
    "faulty",
    [
        b'{"model": ',
        b"[]",
        {"messages": "not a list"},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": CHAT, "temperature": "hot"},
        {"messages": CHAT, "max_tokens": -1},
        {},
    ],
    ids=str,
)
def test_what_is_no_request_is_said_to_be_none(
    served: Any, model: str, faulty: bytes | dict[str, Any]
) -> None:
    body = {"model": model, **faulty} if isinstance(faulty, dict) else faulty
    refused = call(f"{served.url}/v1/chat/completions", body)
    assert refused.status == 400, refused.body
    assert refused.json["error"]["type"] == "invalid_request_error"
    assert refused.json["error"]["message"]
    assert refused.code in {
        "invalid_json",
        "invalid_type",
        "invalid_request",
        "missing_required_parameter",
        "unroutable",
    }


def test_too_long_is_refused_with_the_lengths(served: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="256") as refused:
        client.completions.create(model=EXPERTS[0], prompt=[40] * 300)
    assert refused.value.code == "context_length_exceeded"
    assert "300" in refused.value.message
    with pytest.raises(openai.BadRequestError, match="256") as refused:
        client.chat.completions.create(model="introvert", messages=CHAT, max_tokens=777)
    assert refused.value.code == "context_length_exceeded"
    assert "777" in refused.value.message
    large = {"model": EXPERTS[0], "prompt": "a" * BODY_LIMIT}
    too_large = call(f"{served.url}/v1/completions", large)
    assert (too_large.status, too_large.code) == (413, "request_too_large")
    assert str(BODY_LIMIT) in too_large.json["error"]["message"]


def test_metrics_name_expert_and_worker(served: Any) -> None:
    (home,) = (e["workers"] for e in table_of(served)["experts"] if e["id"] == EXPERTS[0])
    counter = (
        'introvert_gateway_requests_total{endpoint="/v1/completions",'
        f'expert="{EXPERTS[0]}",status="200",worker="{home[0]}"}} '
    )

    def counted() -> float:
        lines = call(f"{served.url}/metrics").body.decode().splitlines()
        return sum(float(line.removeprefix(counter)) for line in lines if counter in line)

    before = counted()
    asked = {"model": EXPERTS[0], "prompt": PROMPT, "max_tokens": 1}
    assert call(f"{served.url}/v1/completions", asked).status == 200
    assert counted() == before + 1
    metrics = call(f"{served.url}/metrics").body.decode()
    for histogram in ("route_seconds", "forward_overhead_seconds"):
        assert f"introvert_gateway_{histogram}_bucket" in metrics
    assert "introvert_gateway_ready_experts 3.0" in metrics


def test_status_prints_the_table(
    served: Any, introvert: Callable[..., Any], tmp_path: Path
) -> None:
    report = tmp_path / "status.json"
    done = introvert("status", "--url", served.url, "--report", report)
    assert done.returncode == 0, done.stderr
    for word in (*EXPERTS, "worker-0", "worker-1", "vllm 0.32.0", "cores:"):
        assert word in done.stdout
    assert "not ready" not in done.stdout
    assert json.loads(report.read_text())["table"] == table_of(served)


def test_a_second_server_on_the_port_says_so(served: Any, introvert: Callable[..., Any]) -> None:
    port = served.url.rpartition(":")[2]
    began = time.monotonic()
    second = introvert("serve", served.work / "config.yaml", "--set", f"gateway.port={port}")
    assert second.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in second.stderr
    assert second.stdout == ""
    assert "Traceback" not in second.stderr
    print(f"\nsaid after {time.monotonic() - began:.1f} s")
    assert call(f"{served.url}/ready").status == 200


def test_a_killed_engine_heals_while_the_other_answers(
    served: Any, client: openai.OpenAI, introvert: Callable[..., Any]
) -> None:
    victim, other = table_of(served)["workers"]
    lost, kept = ([e.partition("@")[0] for e in w["experts"]] for w in (victim, other))
    assert sorted(lost + kept) == EXPERTS
    request = {**LONG, "model": lost[0], "prompt": PROMPT}
    with ThreadPoolExecutor() as pool:
        stream = client.completions.create(**request, stream=True)
        assert next(iter(stream)).choices
        whole = pool.submit(client.completions.create, **request)
        while call(f"{served.url}/admin/status").json["in_flight"][victim["id"]] < 2:
            assert not whole.done()
        os.kill(victim["pid"], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert broken.value.code == "engine_lost"
        refused = whole.exception(CLEAR_S)
    assert isinstance(refused, openai.InternalServerError)
    # it waited for another home; a dying engine may have taken it once more
    assert refused.status_code == 503
    assert refused.code in ("no_engine", "engine_lost")
    assert time.monotonic() - killed < CLEAR_S

    def ask(model: str) -> Reply:
        return call(f"{served.url}/v1/completions", {"model": model, "prompt": PROMPT})

    assert ask(lost[0]).status == 503
    while not (ready := call(f"{served.url}/ready")).json["degraded"]:
        assert time.monotonic() - killed < CLEAR_S
    assert ready.status == 200
    said = introvert("status", "--url", served.url)
    assert said.returncode == 1
    assert "not ready" in said.stdout
    assert "down" in said.stdout
    answered = 0
    waiting = {*lost}
    while waiting:
        assert time.monotonic() - killed < HEAL_S, said.stdout
        for model in (*kept, BASE):
            answer = ask(model)
            assert answer.status == 200, answer.body
            answered += 1
        for model in sorted(waiting):
            answer = ask(model)
            if answer.status == 200:
                waiting.discard(model)
            else:
                assert (answer.status, answer.code) == (503, "no_engine")
                assert int(answer.headers["retry-after"]) > 0
        time.sleep(0.1)
    print(f"\nhealed in {time.monotonic() - killed:.1f} s, {answered} other answers meanwhile")
    assert answered >= len((*kept, BASE))
    healed = table_of(served)["workers"][0]
    assert healed["experts"] == victim["experts"]
    assert (healed["restarts"], healed["detail"]) == (1, "")
    assert healed["pid"] != victim["pid"]
    assert introvert("status", "--url", served.url).returncode == 0


def test_ctrl_c_lets_an_answer_finish_and_leaves_nothing(
    served: Any, client: openai.OpenAI, left_behind: Callable[[], list[str]]
) -> None:
    assert len(left_behind()) > 8, "the check below can fail"
    stream = client.completions.create(**LONG, model=EXPERTS[0], prompt=PROMPT, stream=True)
    finished = [next(iter(stream)).choices[0].finish_reason]
    served.press_ctrl_c()
    began = time.monotonic()
    finished += [chunk.choices[0].finish_reason for chunk in stream]
    assert finished.count("length") == LONG["n"]
    served.press_ctrl_c()  # an impatient one
    assert served.process.wait(120) == 0, served.errors
    print(f"\nended in {time.monotonic() - began:.1f} s")
    assert left_behind() == []
    assert "Traceback" not in served.errors, served.errors
    assert list(served.work.glob("serving-*")) == []
    port = int(served.url.rpartition(":")[2])
    socket.create_server(("127.0.0.1", port)).close()
