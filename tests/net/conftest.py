"""A pod with its outside, and the programs in it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from sidestep._bpf import lib
from tests.harness.netns import Pair, pair
from tests.harness.stand_in import Capture, CaptureError, StandIn


@pytest.fixture(params=["4", "6"])
def family(request: pytest.FixtureRequest) -> int:
    """Both families, one after the other."""
    return int(request.param)


@pytest.fixture
def link() -> Iterator[Pair]:
    """A dual-stack pod and its outside, nothing attached."""
    with pair() as made:
        yield made


@pytest.fixture
def capture(link: Pair) -> Iterator[Capture]:
    """Programs loaded and pinned, not attached."""
    made = Capture(link)
    made.prepare()
    try:
        yield made
    finally:
        with suppress(CaptureError):
            made.detach()


@pytest.fixture
def strict(capture: Capture) -> Iterator[StandIn]:
    """A new pod: strict, with the stand-in's listeners."""
    capture.set_mode(lib.MODE_STRICT)
    made = StandIn(capture)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def closing() -> Iterator[Callable[..., None]]:
    """Call it with anything that has close(): closed at the end."""
    with ExitStack() as stack:

        def add(*things: object) -> None:
            for thing in things:
                stack.callback(thing.close)  # type: ignore[attr-defined]

        yield add
