"""What of a table can be served."""

from __future__ import annotations

from server.gateway.readiness import NOTHING, Readiness, coverage
from tests.server.gateway.conftest import LAW, SPORT, make_table, make_worker, refuse

BOTH = make_table(1, make_worker(0, "http://host:0", [SPORT, LAW]))
HALF = make_table(2, make_worker(0, "http://host:0", [SPORT]))
NONE = make_table(3, make_worker(0, None, [SPORT, LAW], state="starting"))


def test_coverage() -> None:
    assert coverage(BOTH).complete
    assert (coverage(HALF).experts_ready, coverage(HALF).missing) == (1, (LAW,))
    assert (coverage(NONE).experts_ready, coverage(NONE).workers_ready) == (0, 0)


def test_an_expert_needs_one_home_only() -> None:
    down = make_worker(1, None, [SPORT], state="down")
    table = make_table(1, make_worker(0, "http://host:0", [SPORT, LAW]), down)
    readiness = Readiness()
    readiness.update(table)
    assert readiness.coverage.complete
    assert readiness.degraded  # a worker is missing all the same


def test_without_experts_the_base_must_be_there() -> None:
    assert not coverage(make_table(1, make_worker(0, None, [], state="down"), experts=[])).complete
    assert coverage(make_table(1, make_worker(0, "http://host:0", []), experts=[])).complete


def test_a_refused_expert_is_missing_and_not_waited_for() -> None:
    readiness = Readiness()
    readiness.update(refuse(BOTH, LAW))
    assert (readiness.coverage.missing, readiness.coverage.refused) == ((LAW,), {LAW})
    assert (readiness.was_complete, readiness.degraded) == (True, True)


def test_while_a_home_is_not_ready_nothing_is_refused() -> None:
    up, down = (make_worker(n, "http://host", [SPORT, LAW]) for n in range(2))
    table = refuse(make_table(1, up, down.model_copy(update={"state": "starting"})), LAW)
    assert coverage(table).refused == set()
    assert not coverage(table).complete


def test_what_a_ready_worker_is_still_loading_is_not_refused() -> None:
    """As when the only home of an expert is lost, and another worker gets it."""
    loading = make_worker(1, "http://host:1", [SPORT])
    experts = [e.model_copy(update={"workers": [loading.id]}) for e in BOTH.experts]
    table = make_table(4, loading, experts=experts)
    assert coverage(table).missing == (LAW,)
    assert coverage(table).refused == set()
    assert not coverage(table).complete


def test_completeness_is_remembered() -> None:
    readiness = Readiness()
    assert (readiness.coverage, readiness.was_complete) == (NOTHING, False)
    readiness.update(HALF)
    assert not readiness.was_complete
    readiness.update(BOTH)
    assert (readiness.was_complete, readiness.degraded) == (True, False)
    readiness.update(NONE)
    assert (readiness.was_complete, readiness.degraded) == (True, True)
