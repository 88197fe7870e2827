"""Reconcile: a table of single steps, and a walk: from any state to any other, with nothing dangerous on the way."""

from dataclasses import replace
from itertools import product

import pytest

from sidestep.node.reconcile import WAITS, Actual, Capture, Desired, Serving, Step, next_step

IN, OUT, GONE = Desired(True, True), Desired(True, False), Desired(False, False)
NEW = Desired(True, True, fresh=True)
PLAIN = Actual(netns=True)
READY = Actual(True, capture=Capture.PREPARED, engine=Serving.SERVING, listeners=True, identity=True)
LENIENT = replace(READY, capture=Capture.LENIENT, annotated=True)
STRICT = replace(LENIENT, capture=Capture.STRICT)
DRAINING = replace(STRICT, capture=Capture.DRAINING, engine=Serving.DRAINING, annotated=False)
QUIET = 1000

TABLE: list[tuple[str, Desired, Actual, Step]] = [
    ("outside and wanted nowhere", OUT, PLAIN, Step.DONE),
    ("live: certificate before anything", IN, PLAIN, Step.WAIT_IDENTITY),
    ("live: maps", IN, replace(PLAIN, identity=True), Step.PREPARE),
    ("live: listeners before capture", IN, replace(READY, engine=Serving.ABSENT), Step.ENGINE_ADD),
    ("live: slots empty after a crash", IN, replace(READY, listeners=False), Step.ENGINE_ADD),
    ("live: capture", IN, READY, Step.LENIENT),
    ("live: annotation last", IN, replace(LENIENT, annotated=False), Step.ANNOTATE),
    ("live: old connections", IN, replace(LENIENT, old=3), Step.WAIT_OLD),
    ("live: last old one gone", IN, LENIENT, Step.TIGHTEN),
    ("live: no engine, not touched", IN, replace(PLAIN, identity=True, engine_up=False), Step.WAIT_ENGINE),
    ("live: no address yet", IN, replace(PLAIN, address=False), Step.WAIT_IP),
    ("live: no netns", IN, Actual(netns=False), Step.WAIT_NETNS),
    ("reboot: the annotation lies", IN, Actual(netns=False, annotated=True), Step.CLEAR),
    ("new: maps", NEW, PLAIN, Step.PREPARE),
    ("new: capture needs no engine", NEW, replace(PLAIN, capture=Capture.PREPARED, engine_up=False), Step.STRICT),
    ("new: engine", NEW, replace(PLAIN, capture=Capture.STRICT), Step.ENGINE_ADD),
    ("new: certificate", NEW, replace(STRICT, identity=False, annotated=False), Step.WAIT_IDENTITY),
    ("new: annotation", NEW, replace(STRICT, annotated=False), Step.ANNOTATE),
    ("enrolled", IN, STRICT, Step.DONE),
    ("programs taken out", IN, replace(STRICT, intact=False), Step.REPAIR),
    ("programs taken out while the engine is away", IN, replace(STRICT, intact=False, engine_up=False), Step.REPAIR),
    ("engine restarted", IN, replace(STRICT, engine=Serving.ABSENT, listeners=False), Step.ENGINE_ADD),
    ("netns forgotten, programs there", IN, replace(STRICT, netns=False), Step.DONE),
    ("new sandbox: the engine lets go first", IN, replace(STRICT, moved=True), Step.ENGINE_DEL),
    ("new sandbox: then the pins", IN, replace(STRICT, moved=True, engine=Serving.ABSENT), Step.DETACH),
    ("out: annotation first", OUT, STRICT, Step.CLEAR),
    ("out: drain engine first", OUT, replace(STRICT, annotated=False), Step.ENGINE_DRAIN),
    ("out: drain capture", OUT, replace(STRICT, annotated=False, engine=Serving.DRAINING), Step.DRAIN),
    ("out: without an engine", OUT, replace(STRICT, annotated=False, engine_up=False), Step.DRAIN),
    ("out: from lenient", OUT, replace(LENIENT, annotated=False, old=2, engine=Serving.DRAINING), Step.DRAIN),
    ("out: drain engine", OUT, replace(DRAINING, engine=Serving.SERVING), Step.ENGINE_DRAIN),
    ("out: still open", OUT, replace(DRAINING, connections=1, quiet_ms=QUIET), Step.WAIT_DRAINED),
    ("out: not yet quiet", OUT, replace(DRAINING, quiet_ms=QUIET - 1), Step.WAIT_DRAINED),
    ("out: quiet", OUT, replace(DRAINING, quiet_ms=QUIET), Step.DETACH),
    ("out: engine last", OUT, replace(DRAINING, capture=Capture.ABSENT), Step.ENGINE_DEL),
    ("out: engine died while draining", OUT, replace(DRAINING, engine=Serving.ABSENT), Step.DETACH),
    ("out: label off before capture", OUT, READY, Step.ENGINE_DEL),
    ("out: label off before the engine", OUT, replace(READY, engine=Serving.ABSENT), Step.DETACH),
    ("in again while draining", IN, DRAINING, Step.ENGINE_SERVE),
    ("in again, engine serves", IN, replace(DRAINING, engine=Serving.SERVING), Step.LENIENT),
    ("gone: engine", GONE, STRICT, Step.ENGINE_DEL),
    ("gone: engine away", GONE, replace(STRICT, engine_up=False), Step.DETACH),
    ("gone: pins", GONE, replace(STRICT, engine=Serving.ABSENT), Step.DETACH),
    ("gone: nothing left", GONE, PLAIN, Step.DONE),
]


@pytest.mark.parametrize(("want", "have", "step"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_step(want: Desired, have: Actual, step: Step) -> None:
    assert next_step(want, have, QUIET) is step


def perform(step: Step, have: Actual) -> Actual:
    """What the world looks like after a step that succeeded, or after what a waiting step waits for."""
    effects: dict[Step, dict[str, object]] = {
        Step.CLEAR: {"annotated": False},
        Step.PREPARE: {"capture": Capture.PREPARED},
        Step.STRICT: {"capture": Capture.STRICT, "intact": True},
        Step.LENIENT: {"capture": Capture.LENIENT, "intact": True},
        Step.TIGHTEN: {"capture": Capture.STRICT},
        Step.DRAIN: {"capture": Capture.DRAINING},
        Step.ENGINE_ADD: {"engine": Serving.SERVING, "listeners": True},
        Step.ENGINE_SERVE: {"engine": Serving.SERVING},
        Step.ENGINE_DRAIN: {"engine": Serving.DRAINING},
        Step.ENGINE_DEL: {"engine": Serving.ABSENT, "listeners": False},
        Step.DETACH: {
            "capture": Capture.ABSENT,
            "intact": True,
            "moved": have.moved and have.engine is not Serving.ABSENT,
        },
        Step.REPAIR: {"intact": True},
        Step.ANNOTATE: {"annotated": True},
        Step.WAIT_NETNS: {"netns": True},
        Step.WAIT_IP: {"address": True},
        Step.WAIT_ENGINE: {"engine_up": True},
        Step.WAIT_IDENTITY: {"identity": True},
        Step.WAIT_OLD: {"old": 0},
        Step.WAIT_DRAINED: {"connections": 0, "quiet_ms": QUIET},
    }
    return replace(have, **effects[step])  # type: ignore[arg-type]


def every_state() -> list[Actual]:
    flags = (False, True)
    found = [
        Actual(netns, True, moved, capture, intact, up, engine, listeners)
        for netns, moved, capture, intact, up, engine, listeners in product(
            flags, flags, Capture, flags, flags, Serving, flags
        )
    ]
    return [
        replace(have, identity=identity, annotated=annotated, old=open_, connections=open_)
        for have, identity, annotated, open_ in product(found, flags, flags, (0, 1))
    ]


def test_every_state_reaches_every_aim_without_danger() -> None:
    """From each of the states: at most 20 steps to the aim. Never annotated unless captured, listening and
    certified by then; programs never come out of a pod whose annotation is on, nor while the engine has a connection;
    an uncaptured running pod is never captured before listeners and certificate are there.
    """
    for start in every_state():
        for want in (IN, NEW, OUT, GONE):
            have, seen = start, 0
            while (step := next_step(want, have, QUIET)) is not Step.DONE:
                seen += 1
                assert seen <= 20, (want, start, step)
                captured = have.capture in (Capture.STRICT, Capture.LENIENT)
                serving = have.engine is Serving.SERVING and have.listeners
                if step is Step.ANNOTATE:
                    assert captured and have.intact and have.identity and serving
                if step is Step.DETACH and want.exists and not have.moved:
                    assert not have.annotated and not captured
                    assert have.capture is Capture.PREPARED or have.engine is Serving.ABSENT or not have.connections
                if step is Step.LENIENT:
                    assert have.identity and serving and have.engine_up
                if step in (Step.ENGINE_ADD, Step.ENGINE_SERVE, Step.ENGINE_DRAIN, Step.ENGINE_DEL):
                    assert have.engine_up
                assert step in WAITS or perform(step, have) != have, (want, have, step)
                have = perform(step, have)
            if want.enrol:
                assert have.capture is Capture.STRICT and have.annotated and have.engine is Serving.SERVING
            elif want.exists:
                assert have.capture is Capture.ABSENT and not have.annotated and have.engine is Serving.ABSENT
            else:
                assert have.capture is Capture.ABSENT
