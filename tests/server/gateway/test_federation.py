"""The engines' metrics."""

from __future__ import annotations

from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client.parser import text_string_to_metric_families

from server.gateway.federation import Federation, together
from tests.server.gateway.conftest import LAW, SPORT, make_table, make_worker

ENGINE = """\
# HELP vllm:num_requests_running Requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a{b} c"} %d
# HELP vllm:seconds Time.
# TYPE vllm:seconds histogram
vllm:seconds_bucket{le="1.0"} 1
vllm:seconds_bucket{le="+Inf"} 2
vllm:seconds_count 2
vllm:seconds_sum 1.5
# HELP python_info Python.
# TYPE python_info gauge
python_info{} 1
"""


def test_families_stay_together_and_samples_say_whose_they_are() -> None:
    text = together({"worker-0": ENGINE % 3, "worker-1": ENGINE % 4, 'odd"': None}).decode()
    families = list(text_string_to_metric_families(text))
    assert [family.name for family in families] == [
        "introvert_engine_up",
        "vllm:num_requests_running",
        "vllm:seconds",
        "python_info",
    ], "each once: families that come twice are refused"
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["vllm:num_requests_running", "worker-0", "0", "a{b} c"] == 3
    assert samples["vllm:num_requests_running", "worker-1", "0", "a{b} c"] == 4
    assert samples["vllm:seconds_count", "worker-1"] == 2
    assert samples["python_info", "worker-0"] == 1
    assert samples["introvert_engine_up", 'odd"'] == 0
    assert samples["introvert_engine_up", "worker-0"] == 1


async def engine_metrics(request: web.Request) -> web.Response:
    if request.headers.get("authorization") != "Bearer engine-key":
        return web.Response(status=401)
    return web.Response(text=ENGINE % 7)


async def test_engines_are_asked_with_their_key_and_those_that_do_not_answer_told() -> None:
    app = web.Application()
    app.router.add_get("/metrics", engine_metrics)
    async with TestServer(app) as engine:
        table = make_table(
            1,
            make_worker(0, str(engine.make_url("/")), [SPORT]),
            make_worker(1, "http://127.0.0.1:9", [LAW]),
            make_worker(2, None, [], state="starting"),
        )
        lines = (await Federation(lambda: table, "engine-key").all()).decode().splitlines()
        assert [line for line in lines if line.startswith("introvert_engine_up{")] == [
            'introvert_engine_up{worker="worker-0"} 1',
            'introvert_engine_up{worker="worker-1"} 0',
        ]
        running = 'vllm:num_requests_running{worker="worker-0",engine="0",model_name="a{b} c"} 7'
        assert running in lines
        lines = (await Federation(lambda: table).all()).decode().splitlines()
        assert 'introvert_engine_up{worker="worker-0"} 0' in lines
    assert (await Federation(lambda: None).all()).startswith(b"# HELP introvert_engine_up")
