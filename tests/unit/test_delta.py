"""Delta xDS: whatever happens to the catalog and whenever the client answers, it ends with what the server has."""

from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import delta
from sidestep.wire.delta import Catalog, Entry, Follower, Push


def entry(name: str, version: str, *aliases: str) -> Entry:
    return Entry(name, version, f"{name} {version}".encode(), aliases)


def catalog(*entries: Entry) -> Catalog:
    made = Catalog()
    made.update({each.name: each for each in entries})
    return made


def follow(on: Catalog, **first: object) -> Follower:
    made = Follower(on)
    made.request(**first)  # type: ignore[arg-type]
    return made


def names(push: Push | None) -> tuple[list[str], list[str]]:
    assert push is not None
    return [each.name for each in push.entries], list(push.removed)


def test_nothing_before_the_first_request() -> None:
    assert Follower(catalog(entry("a", "1"))).next() is None


def test_wildcard_gets_everything_then_changes_only() -> None:
    on = catalog(entry("a", "1"), entry("b", "1"))
    follower = follow(on)
    push = follower.next()
    assert names(push) == (["a", "b"], [])
    assert push is not None
    follower.request(nonce=push.nonce)
    assert follower.next() is None
    assert follower.changed(on.update({"a": entry("a", "2"), "b": entry("b", "1")}))
    assert names(follower.next()) == (["a"], [])


def test_an_empty_catalog_is_answered_once() -> None:
    follower = follow(catalog())
    push = follower.next()
    assert names(push) == ([], [])
    assert push is not None
    follower.request(nonce=push.nonce)
    assert follower.next() is None


def test_who_comes_back_is_told_what_changed_and_what_has_gone() -> None:
    on = catalog(entry("same", "1"), entry("other", "2"), entry("new", "1"))
    follower = follow(on, versions={"same": "1", "other": "1", "gone": "1"})
    assert names(follower.next()) == (["new", "other"], ["gone"])


def test_who_comes_back_with_everything_is_answered_all_the_same() -> None:
    assert names(follow(catalog(entry("a", "1")), versions={"a": "1"}).next()) == ([], [])


def test_one_push_at_a_time_and_then_the_last_state_once() -> None:
    on = catalog(entry("a", "1"), entry("b", "1"))
    follower = follow(on)
    first = follower.next()
    assert first is not None
    for version in ("2", "3", "4"):
        follower.changed(on.update({"a": entry("a", version)}))
        assert follower.next() is None
    follower.changed(on.update({"c": entry("c", "1")}))
    follower.changed(on.update({"c": None, "b": None}))
    follower.request(nonce=first.nonce)
    push = follower.next()
    assert push is not None and push.entries == (entry("a", "4"),) and push.removed == ("b",)


def test_only_the_nonce_that_was_sent_is_an_answer() -> None:
    on = catalog(entry("a", "1"))
    follower = follow(on)
    push = follower.next()
    assert push is not None
    follower.changed(on.update({"a": entry("a", "2")}))
    for nonce in ("", "0", push.nonce + "0"):
        follower.request(nonce=nonce)
        assert follower.next() is None
    assert follower.acked == 0
    follower.request(nonce=push.nonce)
    assert follower.acked == 1 and follower.next() is not None


def test_a_refusal_is_counted_kept_and_not_repeated() -> None:
    follower = follow(catalog(entry("a", "1")))
    push = follower.next()
    assert push is not None
    follower.request(nonce=push.nonce, error="a: no")
    assert (follower.acked, follower.refused, follower.reason) == (0, 1, "a: no")
    assert follower.next() is None


def test_a_change_and_back_is_no_change() -> None:
    on = catalog(entry("a", "1"))
    follower = follow(on)
    push = follower.next()
    assert push is not None
    follower.request(nonce=push.nonce)
    follower.changed(on.update({"a": entry("a", "2")}))
    follower.changed(on.update({"a": entry("a", "1")}))
    assert follower.next() is None


def test_on_demand() -> None:
    on = catalog(entry("uid-a", "1", "net/10.0.0.1"), entry("uid-b", "1", "net/10.0.0.2"))
    follower = follow(on, subscribe=["*"], unsubscribe=["*"])
    push = follower.next()
    assert names(push) == ([], [])
    assert push is not None
    follower.request(subscribe=["net/10.0.0.1", "net/10.0.0.9"], nonce=push.nonce)
    push = follower.next()
    assert names(push) == (["uid-a"], ["net/10.0.0.9"])
    assert push is not None and push.entries[0].aliases == ("net/10.0.0.1",)
    follower.request(nonce=push.nonce)
    assert not follower.changed(on.update({"uid-b": entry("uid-b", "2", "net/10.0.0.2")}))
    follower.changed(on.update({"uid-c": entry("uid-c", "1", "net/10.0.0.9")}))
    push = follower.next()
    assert names(push) == (["uid-c"], [])
    assert push is not None
    follower.request(nonce=push.nonce, unsubscribe=["net/10.0.0.1"])
    assert not follower.changed(on.update({"uid-a": None}))
    follower.changed(on.update({"uid-c": None}))
    assert names(follower.next()) == ([], ["uid-c"])


def test_what_is_asked_for_again_is_sent_again() -> None:
    on = catalog(entry("a", "1"))
    follower = follow(on, subscribe=["a"])
    for _ in range(2):
        push = follower.next()
        assert names(push) == (["a"], [])
        assert push is not None
        follower.request(subscribe=["a"], nonce=push.nonce)


def test_on_demand_client_that_comes_back_goes_on_with_what_it_held() -> None:
    on = catalog(entry("a", "2"), entry("b", "1"), entry("waited", "1", "net/10.0.0.7"))
    first = {"a": "1", "gone": "1", "net/10.0.0.7": ""}
    follower = follow(on, subscribe=["*"], unsubscribe=["*"], versions=first)
    assert names(follower.next()) == (["a", "waited"], ["gone"])


def test_an_alias_of_two_and_of_none() -> None:
    on = catalog(entry("a", "1", "x"), entry("b", "1", "x"))
    assert on.names("x") == {"a", "b"}
    on.update({"a": entry("a", "2", "y")})
    assert on.names("x") == {"b"} and on.names("y") == {"a"}
    on.update({"a": None, "b": None})
    assert not on.names("x") and not on.names("y") and not on._aliases


def test_large_states_come_in_parts() -> None:
    body = bytes(delta.PUSH_BYTES // 3)
    on = catalog(*(Entry(str(number), "1", body) for number in range(7)))
    follower = follow(on)
    sent: list[str] = []
    while (push := follower.next()) is not None:
        assert sum(len(each.body) for each in push.entries) <= delta.PUSH_BYTES
        sent += [each.name for each in push.entries]
        follower.request(nonce=push.nonce)
    assert sent == sorted(map(str, range(7)))


KEYS = ["a", "b", "c", "d"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from(KEYS), st.integers(1, 4)),
        st.tuples(st.just("del"), st.sampled_from(KEYS), st.just(0)),
        st.tuples(st.just("push"), st.just(""), st.just(0)),
        st.tuples(st.just("ack"), st.just(""), st.just(0)),
        st.tuples(st.just("reconnect"), st.just(""), st.just(0)),
        st.tuples(st.just("subscribe"), st.sampled_from([*KEYS, "alias-a", "alias-b"]), st.just(0)),
        st.tuples(st.just("unsubscribe"), st.sampled_from([*KEYS, "alias-a", "alias-b"]), st.just(0)),
    ),
    max_size=60,
)


class Client:
    """A client that keeps what it is sent, and drops what it no longer asks for."""

    def __init__(self, on: Catalog, wildcard: bool) -> None:
        self.on = on
        self.wildcard = wildcard
        self.keys: set[str] = set()
        self.held: dict[str, Entry] = {}
        self.pending: Push | None = None
        self.connect()

    def connect(self) -> None:
        self.pending = None
        self.follower = Follower(self.on)
        versions = {name: each.version for name, each in self.held.items()}
        if self.wildcard:
            self.follower.request(versions=versions)
        else:
            self.follower.request(["*"], ["*"], versions)
            self.follower.request(self.keys)

    def take(self) -> None:
        if self.pending is None:
            self.pending = self.follower.next()

    def answer(self) -> None:
        if self.pending is None:
            return
        for name in self.pending.removed:
            self.held.pop(name, None)
        for each in self.pending.entries:
            self.held[each.name] = each
        self.follower.request(nonce=self.pending.nonce)
        self.pending = None
        self.drop()

    def drop(self) -> None:
        if not self.wildcard:
            self.held = {name: each for name, each in self.held.items() if self.keys & {name, *each.aliases}}

    def settle(self) -> None:
        for _ in range(20):
            self.take()
            if self.pending is None:
                return
            self.answer()
        raise AssertionError("it never ends")


@given(STEPS, st.booleans())
def test_ends_with_what_the_server_has(steps: list[tuple[str, str, int]], wildcard: bool) -> None:
    on = Catalog()
    client = Client(on, wildcard)
    for step, key, number in steps:
        if step == "set":
            client.follower.changed(on.update({key: entry(key, str(number), f"alias-{key}")}))
        elif step == "del":
            client.follower.changed(on.update({key: None} if key in on.entries else {}))
        elif step == "push":
            client.take()
        elif step == "ack":
            client.answer()
        elif step == "reconnect":
            client.connect()
        elif step == "subscribe" and not wildcard:
            client.keys.add(key)
            client.follower.request(subscribe=[key])
        elif step == "unsubscribe" and not wildcard:
            client.keys.discard(key)
            client.drop()
            client.follower.request(unsubscribe=[key])
    client.answer()
    client.settle()
    wanted = {name: each for name, each in on.entries.items() if wildcard or client.keys & {name, f"alias-{name}"}}
    assert client.held == wanted
