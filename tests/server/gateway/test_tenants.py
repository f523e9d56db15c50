"""API keys at the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import KeysError
from server.gateway import tenants
from server.gateway.errors import RateLimitedError, UnauthorizedError
from server.gateway.tenants import ANYBODY, Keyring, LocalRates, Tenant, bearer_of
from server.keys import KeyEntry, add_key, digest_of, remove_key


def entry(name: str, key: str, **limits: object) -> KeyEntry:
    return KeyEntry.model_validate({"name": name, "sha256": digest_of(key).hex(), **limits})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    add_key(path, entry("alice", "secret-a", weight=2, experts=["expert-0001", "base"]))
    add_key(path, entry("bob", "secret-b", concurrent=2, requests_per_minute=3))
    return path


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]


def test_without_keys_everybody_is_let_in() -> None:
    keyring = Keyring()
    tenant = keyring.identify([])
    assert tenant is ANYBODY
    assert tenant.may_ask("expert-0009")
    with keyring.admit(tenant):
        pass


def test_a_key_is_known_by_its_hash_alone(keys: Path) -> None:
    assert "secret" not in keys.read_text()
    keyring = Keyring(keys)
    alice = keyring.identify(bearer("secret-a"))
    assert (alice.name, alice.weight) == ("alice", 2)
    assert alice.may_ask("base")
    assert not alice.may_ask("expert-0002")
    assert keyring.identify([(b"x-api-key", b"secret-b")]).name == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer("secret-c"),
        bearer(""),
        bearer(digest_of("secret-a").hex()),
        [(b"authorization", b"Basic secret-a")],
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
def test_others_are_not_let_in(keys: Path, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(UnauthorizedError) as caught:
        Keyring(keys).identify(headers)
    assert "secret" not in caught.value.message


def test_where_a_key_is_shown() -> None:
    assert bearer_of([(b"authorization", b"bearer a"), (b"x-api-key", b"b")]) == b"a"
    assert bearer_of([(b"x-api-key", b"b")]) == b"b"


def test_concurrency(keys: Path) -> None:
    keyring = Keyring(keys, rates=_Generous())
    bob = keyring.identify(bearer("secret-b"))
    with keyring.admit(bob):
        with (
            keyring.admit(bob),
            pytest.raises(RateLimitedError, match="2 requests running") as caught,
        ):
            keyring.admit(bob)
        assert caught.value.headers == [(b"retry-after", b"1")]
        with keyring.admit(bob):
            pass


def test_rate(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(tenants.time, "monotonic", lambda: now)
    keyring = Keyring(keys)
    bob = keyring.identify(bearer("secret-b"))
    for _ in range(3):
        with keyring.admit(bob):
            pass
    with pytest.raises(RateLimitedError, match="3 times a minute") as caught:
        keyring.admit(bob)
    assert caught.value.headers == [(b"retry-after", b"20")]
    now += 20
    with keyring.admit(bob):
        pass


def test_a_local_rate_is_the_same_as_a_shared_one() -> None:
    rates = LocalRates()
    assert [rates.ask("a", 4, 1000.0) for _ in range(6)] == [0, 0, 0, 0, 15, 15]


def test_the_file_is_followed(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    keyring = Keyring(keys)
    remove_key(keys, "alice")
    keyring.refresh()
    with pytest.raises(UnauthorizedError):
        keyring.identify(bearer("secret-a"))
    keys.write_text("- name: alice\n")
    keyring.refresh()
    assert "sha256: Field required" in caplog.text
    assert keyring.identify(bearer("secret-b")).name == "bob"
    keys.unlink()
    keyring.refresh()
    assert keyring.identify(bearer("secret-b")).name == "bob", "a lost file locks nobody out"


def test_a_file_that_could_not_be_opened_is_read_later(
    keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a crowd of clients has taken every file descriptor: a revoked key must not stay."""
    keyring = Keyring(keys)
    remove_key(keys, "alice")
    with monkeypatch.context() as patch:

        def fail(path: Path) -> list[KeyEntry]:
            raise KeysError(f"the keys' file {path} cannot be read: Too many open files")

        patch.setattr(tenants, "read_keys", fail)
        keyring.refresh()
        keyring.refresh()
    assert len([r for r in caplog.records if "Too many open files" in r.message]) == 1
    keyring.refresh()
    with pytest.raises(UnauthorizedError):
        keyring.identify(bearer("secret-a"))


def behalf(key: str, name: str) -> list[tuple[bytes, bytes]]:
    return [*bearer(key), (b"x-introvert-tenant", name.encode())]


def test_whoever_has_the_engines_key_asks_on_behalf_of_a_tenant(keys: Path) -> None:
    keyring = Keyring(keys, engine_key="of-the-run")
    alice = keyring.identify(behalf("of-the-run", "alice"))
    assert (alice.name, alice.weight) == ("alice", 2)
    assert not alice.may_ask("expert-0002"), "the allow-list holds"
    bob = keyring.identify(behalf("of-the-run", "bob"))
    for _ in range(9):
        with keyring.admit(bob), keyring.admit(bob), keyring.admit(bob):
            pass  # the limits of its own requests do not hold
    remove_key(keys, "alice")
    keyring.refresh()
    with pytest.raises(UnauthorizedError, match="revoked"):
        keyring.identify(behalf("of-the-run", "alice"))


@pytest.mark.parametrize("name", ["nobody", "", "ä"])
def test_nobody_asks_on_behalf_of_who_is_not_known(keys: Path, name: str) -> None:
    with pytest.raises(UnauthorizedError):
        Keyring(keys, engine_key="of-the-run").identify(behalf("of-the-run", name))


def test_the_header_alone_opens_nothing(keys: Path) -> None:
    for keyring in (Keyring(keys), Keyring(keys, engine_key="of-the-run")):
        assert keyring.identify(behalf("secret-a", "bob")).name == "alice"
        for key in ("", "of-the-ru", "None"):
            with pytest.raises(UnauthorizedError):
                keyring.identify(behalf(key, "bob"))
        with pytest.raises(UnauthorizedError):
            keyring.identify([(b"x-introvert-tenant", b"bob")])
    with pytest.raises(UnauthorizedError):
        Keyring(keys).identify(behalf("of-the-run", "bob"))
    assert Keyring(engine_key="of-the-run").identify(behalf("of-the-run", "bob")) is ANYBODY


def test_a_gateway_does_not_start_with_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read"):
        Keyring(tmp_path / "nothing.yaml")


class _Generous:
    def ask(self, name: str, per_minute: float, now: float) -> float:
        return 0.0


def test_a_tenant_without_limits_costs_nothing() -> None:
    keyring = Keyring(rates=_Generous())
    with keyring.admit(Tenant("x")), keyring.admit(Tenant("x")):
        pass
