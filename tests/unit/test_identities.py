"""Identities: who is asked for, when again, and who is forgotten."""

import itertools
import random
from typing import Any

import pytest

from sidestep.node.identities import BACKOFF_LAST_S, ROOTS_SEEN, ROOTS_SPREAD_S, Certificate, Identities, roots_of

A, B = "spiffe://cluster.local/ns/shop/sa/a", "spiffe://cluster.local/ns/shop/sa/b"


def pem(*names: str) -> str:
    return "".join(f"-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n" for name in names)


def certificate(start: float, end: float, roots: str = pem("R1")) -> Certificate:
    return Certificate("KEY", "CHAIN", roots, start, end, "1")


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


@pytest.mark.parametrize(
    ("text", "roots"),
    [
        (pem("R1"), {"R1"}),
        (pem("R1", "R2"), {"R1", "R2"}),
        (pem("R2") + "# a comment\n\n" + pem("R1"), {"R1", "R2"}),
        (pem("R1", "R1"), {"R1"}),
        (pem("R\n1"), {"R1"}),
        (pem("R1").replace("\n", "\r\n"), {"R1"}),
        ("", set()),
        ("nonsense", set()),
    ],
)
def test_roots_are_compared_by_what_they_are(text: str, roots: set[str]) -> None:
    assert roots_of(text) == roots


def test_other_roots_renew_everything_soon_and_spread() -> None:
    generator = random.Random(1)
    identities = Identities(generator.random)
    uris = [f"spiffe://cluster.local/ns/shop/sa/{number}" for number in range(200)]
    identities.need(uris, 0.0)
    for uri in uris:
        identities.obtained(uri, certificate(0.0, 86400.0), 0.0)
    assert identities.due(1000.0) == []
    assert identities.roots_changed(pem("R1", "R2"), 1000.0) == 200
    due = [len(identities.due(1000.0 + ROOTS_SPREAD_S * part / 4)) for part in range(5)]
    print(f"due by quarters of the spread: {due}")
    assert due[0] == 0 and due[4] == 200
    assert all(30 <= later - sooner <= 70 for sooner, later in itertools.pairwise(due))
    for uri in uris:
        identities.asking(uri)
        identities.obtained(uri, certificate(1000.0, 87400.0, pem("R2", "R1")), 1010.0)
    assert identities.due(1020.0) == [] and identities.roots_changed(pem("R1", "R2"), 1020.0) == 0


def test_roots_that_change_while_a_certificate_is_made_renew_it_again() -> None:
    for changes in (True, False):
        identities = some()
        identities.asking(A)
        if changes:
            identities.roots_changed(pem("R1", "R2"), 101.0)
        identities.obtained(A, certificate(100.0, 900.0), 102.0)
        assert (A in identities.due(102.0 + ROOTS_SPREAD_S)) is changes


def test_a_certificate_with_new_roots_renews_the_others_once() -> None:
    identities = some()
    for uri in (A, B):
        identities.asking(uri)
        identities.obtained(uri, certificate(100.0, 90000.0), 100.0)
    identities.asking(A)
    identities.obtained(A, certificate(100.0, 90000.0, pem("R1", "R2")), 110.0)
    assert identities.due(110.0 + ROOTS_SPREAD_S) == [B]
    # A second authority, which has not heard of it: the two must not renew each other's for ever.
    for now in range(200, 200 + 4 * ROOTS_SEEN):
        for uri, roots in ((A, pem("R1")), (B, pem("R1", "R2"))):
            identities.asking(uri)
            identities.obtained(uri, certificate(100.0, 90000.0, roots), float(now))
        assert identities.due(float(now) + ROOTS_SPREAD_S) == []


def test_roots_that_change_do_not_wake_who_has_none_before_his_time() -> None:
    identities = some(0.5)
    wait = identities.failed(A, "away", 100.0)
    identities.roots_changed(pem("R2"), 100.0)
    assert A not in identities.due(100.0 + wait - 0.1) and A in identities.due(100.0 + wait)


@pytest.mark.parametrize(
    ("start", "end", "now", "due"), [(0, 1000, 600, 800), (0, 1000, 990, 995), (0, 1000, 999, 1000)]
)
def test_past_its_half_it_is_renewed_at_half_of_what_is_left(start: Any, end: Any, now: Any, due: Any) -> None:
    identities = some()
    identities.obtained(A, certificate(start, end), now)
    assert A not in identities.due(due - 0.5) and A in identities.due(due)


def test_an_authority_that_is_away_for_a_day_is_asked_a_bounded_number_of_times() -> None:
    """From half life on without an answer: still valid until it ends, never more often than the back-off says."""
    generator = random.Random(2)
    identities, now, asked = Identities(generator.random), 0.0, 0
    identities.need([A], now)
    identities.obtained(A, certificate(0.0, 86400.0), now)
    while (due := identities.next_due_s()) is not None and due < 86400.0 * 2:
        assert due > now
        now = due
        assert identities.due(now) == [A]
        identities.asking(A)
        identities.failed(A, "no route", now)
        asked += 1
        identity = identities.get(A)
        assert identity is not None and identity.valid(now) is (now < 86400.0)
    print(f"asked {asked} times in {(86400 * 2 - 43200) / 3600:.0f} h")
    assert 86400 * 1.5 / (BACKOFF_LAST_S * 1.2) < asked < 86400 * 1.5 / (BACKOFF_LAST_S * 0.8) + 20


def test_the_key_is_not_shown() -> None:
    assert "KEY" not in repr(certificate(0.0, 1.0))
