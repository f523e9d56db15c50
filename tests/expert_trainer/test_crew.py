from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_trainer.crew import MAX_FAILED_STARTS, Node, Place, Share, Starts, reconcile

shares = st.builds(Share, st.integers(1, 4), st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0, 2.0]))


@st.composite
def clusters(draw: st.DrawFn) -> list[Node]:
    """Up to six nodes on up to three hosts."""
    return [
        Node(f"n{i}", f"host{draw(st.integers(0, 2))}", f"a:{i}", *draw(sizes))
        for i in range(draw(st.integers(0, 6)))
    ]


sizes = st.tuples(st.integers(0, 12), st.integers(0, 4))


def gpus_needed(actors: int, share: Share) -> int:
    """GPUs that actors take up, none of them parts of two."""
    if share.gpus >= 1:
        return int(actors * share.gpus)
    return -(-actors // int(1 / share.gpus)) if share.gpus else 0


def check(nodes: list[Node], places: list[Place], share: Share) -> None:
    """All places fit, and no two share a slot or a core."""
    assert len({(place.node, place.slot) for place in places}) == len(places)
    cores: Counter[tuple[str, int]] = Counter()
    for node in nodes:
        mine = [place for place in places if place.node == node.id]
        assert len(mine) * share.cpus <= node.cpus
        assert gpus_needed(len(mine), share) <= node.gpus or share.gpus == 0
        for place in mine:
            assert (place.first_core is None) == (share.gpus > 0)
            if place.first_core is not None:
                for core in range(place.first_core, place.first_core + share.cpus):
                    cores[node.host, core] += 1
    assert all(count == 1 for count in cores.values())
    for host in {node.host for node in nodes}:
        total = sum(node.cpus for node in nodes if node.host == host)
        assert all(core < total for name, core in cores if name == host)


@given(clusters(), clusters(), shares, st.integers(0, 40), st.data())
def test_places_fit_their_nodes_whatever_comes_and_goes(
    before: list[Node], after: list[Node], share: Share, wanted: int, data: st.DataObject
) -> None:
    first = reconcile(before, [], share, wanted)
    check(before, first, share)
    room = sum(share.room(node) for node in before)
    assert len(first) == min(wanted, room)
    # some actors end, some nodes vanish and some come, on any host
    renamed = [
        Node(f"m{node.id}", node.host, f"b{node.id}", node.cpus, node.gpus) for node in after
    ]
    stay = [node for node in before if data.draw(st.booleans())]
    taken = [place for place in first if data.draw(st.booleans())]
    nodes = stay + renamed
    added = reconcile(nodes, taken, share, wanted)
    alive = {node.id for node in nodes}
    check_after = [place for place in taken if place.node in alive] + added
    assert len({(place.node, place.slot) for place in check_after}) == len(check_after)
    assert {place.node for place in added} <= alive
    used = Counter(place.node for place in check_after)
    assert all(used[node.id] <= share.room(node) for node in nodes)
    room = sum(share.room(node) for node in nodes)
    living = len(check_after) - len(added)
    assert len(added) == max(0, min(wanted - len(taken), room - living))
    # nothing is left to add once that is done
    assert reconcile(nodes, taken + added, share, min(wanted, len(taken) + len(added))) == []


def test_actors_are_spread_over_nodes() -> None:
    nodes = [Node(f"n{i}", f"h{i}", f"a:{i}", 8, 0) for i in range(4)]
    places = reconcile(nodes, [], Share(2, 0), 6)
    assert sorted(Counter(place.node for place in places).values()) == [1, 1, 2, 2]


def test_gpus_are_counted_on_each_node() -> None:
    nodes = [Node("a", "a", "a:1", 8, 1), Node("b", "b", "b:1", 8, 1)]
    assert reconcile(nodes, [], Share(1, 2.0), 9) == [], "two nodes of one GPU are not one of two"
    assert len(reconcile(nodes, [], Share(1, 0.6), 9)) == 2
    assert len(reconcile(nodes, [], Share(1, 0.5), 9)) == 4
    assert len(reconcile(nodes, [], Share(5, 0.5), 9)) == 2, "no node has cores for two"


def test_nodes_on_one_host_share_its_cores_and_use_what_a_vanished_one_frees() -> None:
    one, two, three = (Node(name, "host", f"a:{name}", 2, 0) for name in ("1", "2", "3"))
    places = reconcile([one, two], [], Share(1, 0), 4)
    assert sorted(place.first_core for place in places if place.first_core is not None) == [
        0,
        1,
        2,
        3,
    ]
    left = [place for place in places if place.node == "2"]
    added = reconcile([two, three], left, Share(1, 0), 4)
    assert {place.node for place in added} == {"3"}
    freed = {place.first_core for place in places if place.node == "1"}
    assert {place.first_core for place in added} == freed


def test_a_node_is_left_out_after_failed_starts_in_a_row() -> None:
    good, bad = Node("good", "h", "a:1", 1, 0), Node("bad", "h", "a:2", 1, 0)
    starts = Starts()
    for _ in range(MAX_FAILED_STARTS - 1):
        assert not starts.failed("bad", ValueError("first"))
    starts.succeeded("bad")
    assert [starts.failed("bad", ValueError("then")) for _ in range(4)] == [
        False,
        False,
        True,
        False,
    ]
    assert starts.usable([good, bad]) == [good]
    assert starts.cause([good]) is None
    cause = starts.cause([good, bad])
    with pytest.raises(ValueError, match="then"):
        raise cause or AssertionError
