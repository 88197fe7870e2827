"""Packets that are lost on their way from a pod: a filter behind ours on the pod's interface, so that what our programs
did of it is done, and nothing of it arrives, by a door or otherwise.
"""

import contextlib
import platform
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.harness.netns import Pair, run

SOURCE = Path(__file__).parent / "lose.bpf.c"
_PREF = "7"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="sidestep-lose-")
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    words = ("-O2", "-g", "-target", "bpf", "-mcpu=v2", include, "-c", str(SOURCE), "-o", f"{folder.name}/lose.o")
    run("clang-16", *words)
    return folder


def lose_object() -> str:
    """The object file; its sections are tc/tcp and tc/all_but_syn."""
    return f"{_folder().name}/lose.o"


@contextlib.contextmanager
def losing(pair: Pair, what: str = "tcp") -> Iterator[None]:
    """`what`: tcp, or all_but_syn."""
    tc = ("nsenter", f"--net={pair.pod_path}", "tc")
    where = ("dev", "eth0", "egress", "pref", _PREF)
    run(*tc, "filter", "add", *where, "bpf", "direct-action", "object-file", lose_object(), "section", f"tc/{what}")
    try:
        yield
    finally:
        run(*tc, "filter", "del", *where)
