from __future__ import annotations

from server.homes import Homes, shelters
from server.placement import ExpertDemand, Placement, Policy, WorkerCapacity

EXPERTS = [ExpertDemand("a", 0.5, 8), ExpertDemand("b", 0.5, 8)]
WORKERS = [WorkerCapacity(name, None) for name in ("w0", "w1", "w2")]
PLACEMENT = Placement({"a": ("w0",), "b": ("w0", "w1")})


def test_an_expert_whose_homes_are_all_out_gets_one_shelter_more() -> None:
    homes = shelters(PLACEMENT, EXPERTS, WORKERS, {"w0"}, Policy())
    assert homes["b"] == ("w0", "w1"), "it has another home"
    assert homes["a"][0] == "w0"
    assert homes["a"][1:] in {("w1",), ("w2",)}


def test_nobody_moves_where_nobody_is_left() -> None:
    out = {"w0", "w1", "w2"}
    assert shelters(PLACEMENT, EXPERTS, WORKERS, out, Policy()) == PLACEMENT.homes


def test_a_home_lets_go_once_another_has_held_the_expert_for_a_while() -> None:
    homes = Homes(settle_s=5.0, drain_s=10.0)
    assert homes.look({"a": ("w0",)}, {"w0": {"a"}}, 0.0) == {"a": ("w0",)}
    assert homes.look({"a": ("w1",)}, {"w0": {"a"}}, 1.0) == {"a": ("w1", "w0")}
    held = {"w0": {"a"}, "w1": {"a"}}
    assert homes.look({"a": ("w1",)}, held, 2.0) == {"a": ("w1", "w0")}
    assert homes.look({"a": ("w1",)}, held, 6.9) == {"a": ("w1", "w0")}
    assert homes.look({"a": ("w1",)}, held, 7.0) == {"a": ("w1",)}
    assert homes.holds("a", "w0"), "for the requests on their way"
    homes.look({"a": ("w1",)}, held, 16.9)
    assert homes.holds("a", "w0")
    homes.look({"a": ("w1",)}, held, 17.0)
    assert not homes.holds("a", "w0")


def test_a_home_that_is_lost_meanwhile_is_not_kept() -> None:
    homes = Homes(settle_s=5.0, drain_s=10.0)
    homes.look({"a": ("w0",)}, {"w0": {"a"}}, 0.0)
    assert homes.look({"a": ("w1",)}, {}, 1.0) == {"a": ("w1",)}
    assert not homes.holds("a", "w0")


def test_what_is_not_to_be_held_at_all_goes_at_once() -> None:
    homes = Homes(settle_s=5.0, drain_s=10.0)
    homes.look({"a": ("w0",), "b": ("w0",)}, {"w0": {"a", "b"}}, 0.0)
    assert homes.look({"b": ("w0",)}, {"w0": {"a", "b"}}, 1.0) == {"b": ("w0",)}
    assert not homes.holds("a", "w0")


def test_what_a_host_is_found_to_hold_stays_for_requests_on_their_way() -> None:
    homes = Homes(settle_s=5.0, drain_s=10.0)
    held = {"w0": {"a", "b", "c"}}
    homes.look({"a": ("w1",), "b": ("w0",)}, {}, 0.0)
    homes.found("w0", held["w0"], 1.0)
    homes.look({"a": ("w1",), "b": ("w0",)}, held, 1.0)
    assert homes.holds("a", "w0")
    assert not homes.holds("c", "w0"), "nobody wants it anywhere"
    homes.look({"a": ("w1",), "b": ("w0",)}, held, 11.0)
    assert not homes.holds("a", "w0")
    assert homes.holds("b", "w0")
