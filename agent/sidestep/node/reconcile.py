"""What to do next with one pod: desired state and actual state in, one step out. Pure: no I/O, no clock.

The agent asks `next_step`, performs it, looks again, and asks again, until the answer is a `Step` that only waits.
No step remembers an earlier one, so any state may follow any other: a label flipped in the middle, a crash of either
process, a pod that is gone. The order inside an enrolment (design section 3) follows from the rules, not from a
script:

- live: identity, pins, the engine's listeners, capture that notes and lets open sockets pass, verification,
annotation;
- new pod: capture first (strict), so that not one packet leaves before; the engine holds what comes too early;
- un-enrolment: annotation off first, then draining, then nothing of ours is left.
"""

from dataclasses import dataclass
from enum import Enum


class Capture(Enum):
    """What the programs in the pod's network namespace do."""

    ABSENT = "absent"
    PREPARED = "prepared"  # maps and pins, no program attached
    STRICT = "strict"
    LENIENT = "lenient"
    DRAINING = "draining"


class Serving(Enum):
    """What the engine does for the pod."""

    ABSENT = "absent"
    SERVING = "serving"
    DRAINING = "draining"


class Step(Enum):
    """One thing to do; those after WAITS mean: nothing now, ask again when something changed (the value says
    what is missing).
    """

    CLEAR = "take the annotation off"
    PREPARE = "make maps and pins"
    STRICT = "capture everything"
    LENIENT = "capture all but the connections that are open"
    TIGHTEN = "old connections are gone: capture everything"
    DRAIN = "let new connections pass"
    ENGINE_ADD = "give the pod to the engine"
    ENGINE_SERVE = "the engine serves it again"
    ENGINE_DRAIN = "the engine lets it go"
    ENGINE_DEL = "take it from the engine"
    DETACH = "take the programs out"
    REPAIR = "put back what was taken out"
    ANNOTATE = "tell the mesh that it speaks HBONE"
    WAIT_NETNS = "network namespace"
    WAIT_IP = "address"
    WAIT_ENGINE = "engine"
    WAIT_IDENTITY = "certificate"
    WAIT_OLD = "old connections"
    WAIT_DRAINED = "connections that are draining"
    DONE = ""


WAITS = frozenset(
    {Step.WAIT_NETNS, Step.WAIT_IP, Step.WAIT_ENGINE, Step.WAIT_IDENTITY, Step.WAIT_OLD, Step.WAIT_DRAINED, Step.DONE}
)


@dataclass(frozen=True, slots=True)
class Desired:
    """From the API and from CNI: `exists` the pod is there, `enrol` it belongs into the mesh, `fresh` it never
    ran outside.
    """

    exists: bool
    enrol: bool
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Actual:
    """What is found. `netns`: a network namespace of the pod is known; `address`: so is an address. `moved`:
    programs or engine still hold another one than this. `intact`: every program and pin verified. `engine_up`: there
    is a connection to the engine. `listeners`: the SOCKMAP's slots hold sockets. `identity`: the engine has a valid
    certificate. `old`: sockets from before that are still open. `connections`, `quiet_ms`: the engine's POD_STATS.
    """

    netns: bool
    address: bool = True
    moved: bool = False
    capture: Capture = Capture.ABSENT
    intact: bool = True
    engine_up: bool = True
    engine: Serving = Serving.ABSENT
    listeners: bool = False
    identity: bool = False
    annotated: bool = False
    old: int = 0
    connections: int = 0
    quiet_ms: int = 0


def next_step(want: Desired, have: Actual, drain_quiet_ms: int) -> Step:
    """The one thing to do next for a pod."""
    if not want.exists:
        return _remove(have)
    if have.moved and (have.capture is not Capture.ABSENT or have.engine is not Serving.ABSENT):
        step = _remove(have)
        return Step.WAIT_ENGINE if step is Step.DONE else step
    return _enrol(want, have) if want.enrol else _release(have, drain_quiet_ms)


def _remove(have: Actual) -> Step:
    """The engine first, so that what it still holds is reset while capture still keeps clear text in."""
    if have.engine is not Serving.ABSENT and have.engine_up:
        return Step.ENGINE_DEL
    if have.capture is not Capture.ABSENT:
        return Step.DETACH
    return Step.DONE


def _enrol(want: Desired, have: Actual) -> Step:
    captured = have.capture in (Capture.STRICT, Capture.LENIENT)
    if not have.netns and not captured:
        # An annotation left from before a reboot says HBONE of a pod that has no listener: worse than none.
        return Step.CLEAR if have.annotated else Step.WAIT_NETNS
    if not have.address:
        return Step.WAIT_IP
    if not captured and want.fresh:
        return Step.PREPARE if have.capture is Capture.ABSENT else Step.STRICT
    if captured and not have.intact:
        return Step.REPAIR
    if not have.engine_up:
        return Step.WAIT_ENGINE
    if not captured:
        # A pod that runs: its traffic is not touched before everything that will serve it is there.
        if not have.identity:
            return Step.WAIT_IDENTITY
        if have.capture is Capture.ABSENT:
            return Step.PREPARE
        if have.engine is Serving.ABSENT or not have.listeners:
            return Step.ENGINE_ADD
        if have.engine is Serving.DRAINING:
            return Step.ENGINE_SERVE
        return Step.LENIENT
    if have.engine is Serving.ABSENT or not have.listeners:
        return Step.ENGINE_ADD
    if have.engine is Serving.DRAINING:
        return Step.ENGINE_SERVE
    if not have.identity:
        return Step.WAIT_IDENTITY
    if not have.annotated:
        return Step.ANNOTATE
    if have.capture is Capture.LENIENT:
        return Step.TIGHTEN if have.old == 0 else Step.WAIT_OLD
    return Step.DONE


def _release(have: Actual, drain_quiet_ms: int) -> Step:
    if have.annotated:
        return Step.CLEAR
    if have.capture in (Capture.STRICT, Capture.LENIENT):
        # Programs that cannot be verified cannot be changed safely either: repaired first, then drained.
        if not have.intact:
            return Step.REPAIR
        # The engine first: once the programs drain, clear text of this pod is no vouched flow that came too late.
        return Step.ENGINE_DRAIN if have.engine is Serving.SERVING and have.engine_up else Step.DRAIN
    if have.capture is Capture.PREPARED:
        if have.engine is not Serving.ABSENT:
            return Step.ENGINE_DEL if have.engine_up else Step.WAIT_ENGINE
        return Step.DETACH
    if have.capture is Capture.DRAINING:
        if not have.engine_up:
            return Step.WAIT_ENGINE
        if have.engine is Serving.SERVING:
            return Step.ENGINE_DRAIN
        if have.engine is Serving.DRAINING and (have.connections or have.quiet_ms < drain_quiet_ms):
            return Step.WAIT_DRAINED
        return Step.DETACH
    if have.engine is not Serving.ABSENT:
        return Step.ENGINE_DEL if have.engine_up else Step.WAIT_ENGINE
    return Step.DONE
