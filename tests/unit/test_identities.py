"""Identities: who is asked for, when again, and who is forgotten."""

from sidestep.node.identities import BACKOFF_LAST_S, Certificate, Identities

A, B = "spiffe://cluster.local/ns/shop/sa/a", "spiffe://cluster.local/ns/shop/sa/b"


def certificate(start: float, end: float) -> Certificate:
    return Certificate("KEY", "CHAIN", "ROOT", start, end, "1")


def some(uniform: float = 0.0) -> Identities:
    identities = Identities(lambda: uniform)
    identities.need([A, B], 100.0)
    return identities


def test_needed_is_due_at_once_and_not_twice() -> None:
    identities = some()
    assert identities.due(100.0) == [A, B]
    identities.asking(A)
    assert identities.due(100.0) == [B]
    identities.need([A, B], 101.0)
    assert identities.due(101.0) == [B]


def test_renewed_at_half_life_with_jitter() -> None:
    for uniform, due in ((0.0, 500.0), (1.0, 460.0)):
        identities = some(uniform)
        assert identities.obtained(A, certificate(100.0, 900.0), 100.0)
        assert A not in identities.due(due - 1)
        assert A in identities.due(due)


def test_who_has_none_comes_first() -> None:
    identities = some()
    identities.obtained(A, certificate(0.0, 200.0), 100.0)
    assert identities.due(199.0) == [B, A]


def test_failures_back_off_and_are_reset() -> None:
    identities, now = some(0.5), 100.0
    waits = []
    for _ in range(10):
        waits.append(identities.failed(A, "no route", now))
        now += waits[-1]
        assert A in identities.due(now)
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == BACKOFF_LAST_S
    identity = identities.get(A)
    assert identity is not None and identity.error == "no route" and not identity.valid(now)
    identities.obtained(A, certificate(now, now + 1000), now)
    assert identities.failed(A, "again", now + 500) == 1.0


def test_failure_is_repeated_before_the_end() -> None:
    identities = some(0.5)
    identities.obtained(A, certificate(0.0, 200.0), 100.0)
    for _ in range(9):
        identities.failed(A, "away", 100.0)
    assert identities.failed(A, "away", 150.0) == 50.0


def test_unused_is_dropped_and_a_late_certificate_too() -> None:
    identities = some()
    identities.asking(B)
    assert identities.need([A], 101.0) == [B]
    assert not identities.obtained(B, certificate(100.0, 900.0), 102.0)
    assert [identity.uri for identity in identities] == [A]


def test_valid_ends() -> None:
    identities = some()
    identities.obtained(A, certificate(100.0, 900.0), 100.0)
    identity = identities.get(A)
    assert identity is not None and identity.valid(899.0) and not identity.valid(900.0)


def test_a_certificate_past_its_half_is_not_asked_for_in_a_loop() -> None:
    identities = some()
    identities.obtained(A, certificate(0.0, 100.0), 90.0)
    assert A not in identities.due(90.5)


def test_the_key_is_not_shown() -> None:
    assert "KEY" not in repr(certificate(0.0, 1.0))
