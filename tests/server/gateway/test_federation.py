"""The engines' metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.gateway import federation
from server.gateway.federation import Federation, together
from tests.server.gateway.conftest import LAW, SPORT, FakeEngine, make_table, make_worker

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


async def test_engines_that_do_not_answer_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await FakeEngine().start()  # answers GET with 405
    try:
        table = make_table(
            1,
            make_worker(0, engine.url, [SPORT]),
            make_worker(1, "http://127.0.0.1:9", [LAW]),
            make_worker(2, None, [], state="starting"),
        )
        monkeypatch.setattr(federation, "KEPT_S", -1.0)
        asked = Federation(lambda: table)
        lines = (await asked.all()).decode().splitlines()
        up = [line for line in lines if line.startswith("introvert_engine_up{")]
        assert up == [
            'introvert_engine_up{worker="worker-0"} 0',
            'introvert_engine_up{worker="worker-1"} 0',
        ]
    finally:
        await engine.stop()
    assert (await Federation(lambda: None).all()).startswith(b"# HELP introvert_engine_up")
