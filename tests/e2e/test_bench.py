"""`make bench` does what it says: a case that did not go the way it claims is aborted, and the status says so."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.targets import accelerates
from tests.harness.lab import ROOT, everything_of

ROW = "connect-request-close, 1 at a time"


def bench(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """A quick run of one row. Returns its status and its report."""
    command = [sys.executable, "-m", "tests.bench", "--quick", "--rows", ROW, "--json", str(path), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, dict(json.loads(path.read_text()))


@pytest.mark.slow
def test_every_target_goes_the_way_it_claims(tmp_path: Path) -> None:
    status, report = bench(tmp_path / "bench.json")
    assert [row["aborted"] for row in report["rows"]] == [{}, {}]
    assert status == 0
    across, local = (set(row["targets"]) for row in report["rows"])
    assert across == {"plain", "floor", "sidestep", "envoy"}
    assert local == {"plain", "sidestep", *(["native"] if accelerates() else [])}
    assert all(entry["rate"]["median"] > 0 for row in report["rows"] for entry in row["targets"].values())
    assert f"| {ROW} |" in (tmp_path / "bench.md").read_text()
    judged = {row["place"]: row["judged"] for row in report["rows"]}
    assert judged == {"across": "sidestep", "local": "native" if accelerates() else "sidestep"}


@pytest.mark.slow
def test_pods_outside_the_mesh_abort_its_cases(tmp_path: Path) -> None:
    status, report = bench(tmp_path / "bench.json", "--control", "--targets", "sidestep")
    assert status == 1
    for row in report["rows"]:
        assert list(row["aborted"]) == ["sidestep"]
        assert "0 ends with mutual TLS, 0 local ones" in row["aborted"]["sidestep"]
        assert list(row["targets"]) == ["plain"]


@pytest.mark.slow
def test_a_peer_that_passes_nothing_on_aborts_its_cases(tmp_path: Path) -> None:
    # It sends the load to the server of its own node: the bytes never cross the link.
    command = "echo to across 7100 $BENCH_NEAR_IP 7100; echo version none; echo ready; sleep 1000"
    status, report = bench(tmp_path / "bench.json", "--targets", "plain", "--peer", command)
    assert status == 1
    across, local = report["rows"]
    assert "bytes crossed the link" in across["aborted"]["peer"]
    assert "peer" in local["targets"]


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_lab(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    words = ["--rows", ROW, "--targets", "plain", "--rounds", "1000", "--json", str(path)]
    command = [sys.executable, "-m", "tests.bench", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = ""
            while "round 1/1000" not in said:
                said = process.stderr.readline()
                assert said, "it ended"
            name = f"bp{process.pid % 10000}"
            assert everything_of(name)
            for _ in range(2):  # who is impatient gets no lab that is half gone
                process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130
        finally:
            process.kill()
    assert everything_of(name) == []
    assert not path.exists()
