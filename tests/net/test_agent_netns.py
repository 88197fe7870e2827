"""Namespaces of pods in the real kernel: opened, refused, found by address and by record."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.node import netns


@pytest.fixture
def name() -> Iterator[str]:
    name = f"t-agns-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "-n", name, "addr", "add", "10.231.7.1/32", "dev", "lo"], check=True)
    subprocess.run(["ip", "-n", name, "addr", "add", "fd0a:e707::1/128", "dev", "lo", "nodad"], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_namespace_is_told_by_inode_and_cookie(name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first, second = netns.open_path(f"/run/netns/{name}"), netns.open_path(f"/run/netns/{name}")
    assert (first.ino, first.cookie) == (second.ino, second.cookie) and first.ino not in netns.host_inodes()
    assert first.cookie > 0
    for each in (first, first, second):
        each.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["/proc/self/ns/net", "/proc/1/ns/net", "/proc/self/ns/mnt", "/dev/null", "/nowhere"])
def test_refused(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(netns.NetnsError):
        netns.open_path(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_ownership_is_by_address_of_either_family(name: str) -> None:
    found = netns.open_path(f"/run/netns/{name}")
    try:
        assert netns.owns_address(found, ["192.0.2.9", "10.231.7.1"])
        assert netns.owns_address(found, ["fd0a:e707::1"])
        assert not netns.owns_address(found, ["10.231.7.2", "fd0a:e707::2"])
        assert (
            os.stat("/proc/self/ns/net").st_ino == os.stat(f"/proc/self/task/{threading.get_native_id()}/ns/net").st_ino
        )
    finally:
        found.close()


def test_records_outlive_the_process_and_survive_rubbish(tmp_path: Path) -> None:
    records = netns.Records(tmp_path / "pods")
    record = netns.Record(
        "u-1", "shop", "web", "default", "c1", "eth0", "/run/netns/a", 4026531999, 7, ("10.1.0.5", "fd00::5")
    )
    records.save(record)
    (tmp_path / "pods" / "u-2.json").write_text("{")
    (tmp_path / "pods" / "u-3.json").write_text('{"uid": "u-3"}')
    assert netns.Records(tmp_path / "pods").load() == {"u-1": record}
    records.remove("u-1")
    records.remove("u-1")
    assert netns.Records(tmp_path / "pods").load() == {} and os.listdir(tmp_path / "pods") == []
    with pytest.raises(netns.NetnsError):
        records.remove("../../etc/passwd")


def test_found_by_a_name_in_the_runtimes_directory(name: str) -> None:
    found = netns.search_dir(Path("/run/netns"), [str(os.getpid()), "no-such-pod"])
    assert list(found) == [str(os.getpid())]
    found[str(os.getpid())].close()
