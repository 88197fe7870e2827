"""`make demo` keeps its word: it ends with 0 only when every step came out as promised, and leaves nothing."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.harness.lab import ROOT, SIDESTEP, everything_of

DEMO = [sys.executable, "-m", "examples.shop.demo"]


def demo(name: str, same_node: str, during: Callable[[str], None] = lambda line: None) -> tuple[int, str, str]:
    """Runs the demo as make does, with the setting; `during` sees each line as it comes. Exit status, what it showed,
    what it complained about. The lab is gone afterwards, whatever happened.
    """
    shown = []
    with subprocess.Popen(
        [*DEMO, "--name", name, "--same-node", same_node],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                shown.append(line)
                during(line)
            said = process.stderr.read()
            status = process.wait(60)
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            raise
        finally:
            left = everything_of(name)
            subprocess.run([SIDESTEP, "lab", "down", "--name", name], capture_output=True, timeout=120, check=False)
    assert left == []
    return status, "".join(shown), said


@pytest.mark.slow
def test_it_shows_all_its_steps(same_node: str) -> None:
    status, shown, said = demo(f"o{os.getpid() % 10000}", same_node)
    print(shown)
    assert (status, said) == (0, "")
    assert re.findall(r"^\(([a-z])\) ", shown, re.MULTILINE) == ["a", "b", "c", "d", "e"]
    # Plain, mesh and plain again, each with what was measured.
    assert re.search(r"\(a\).*corner shop.*SELECT name.*all readable.*\(b\)", shown, re.DOTALL)
    assert re.search(r"\(b\).*ok  5 pods enrolled.*\(c\).*requests so far, 0 failed.*\(d\)", shown, re.DOTALL)
    carried = re.search(r"\(d\).*?(\d+) tunnels, each TLS 1.3 to port 15008, carried (\d+) bytes", shown, re.DOTALL)
    assert carried is not None
    assert int(carried[1]) > 0
    assert int(carried[2]) > 10_000
    assert "spiffe://cluster.local/ns/shop/sa/web" in shown
    assert re.search(r"\(e\).*readable again.*requests so far, 0 failed", shown, re.DOTALL)
    assert "Done" in shown


@pytest.mark.slow
def test_it_fails_when_the_mesh_loses_something() -> None:
    """From the moment of the label on both engines die, again and again: customers notice, and the demo says so."""
    name = f"x{os.getpid() % 10000}"
    killed: list[int] = []

    def murder(line: str) -> None:
        if not killed and "pods enrolled" not in line:
            return
        for _ in range(3 if not killed else 1):
            asked = [SIDESTEP, "lab", "status", "--name", name, "--json"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
            if done.returncode:  # taken down already
                return
            for node in json.loads(done.stdout)["nodes"]:
                with contextlib.suppress(ProcessLookupError):
                    if node["processes"]["engine"]["pid"]:
                        os.kill(node["processes"]["engine"]["pid"], signal.SIGKILL)
                        killed.append(node["processes"]["engine"]["pid"])

    status, shown, said = demo(name, "direct", murder)
    print(shown, said)
    assert killed
    assert status == 1
    assert len(said.strip().splitlines()) == 1, said
    assert said.strip().startswith("demo: ")
    assert "Done" not in shown
