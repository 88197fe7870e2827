"""A pod as an agent of a layout of the pins before has left it: its programs, its maps, its pins.

layout_vN.o.xz is that layout's capture object as the build made it, without line numbers: v1 of commit 23537da, v2 of
f111801. It is loaded and attached here with bpftool and tc, as the loader of that time did.
"""

import contextlib
import ctypes
import lzma
import os
import shutil
import struct
from pathlib import Path

from tests.harness.kubelet import Map, packed
from tests.harness.netns import Pair, run

FOLDER = Path(__file__).parent
# The maps that pods share.
SHARED = {"v1": ("probe_notes",), "v2": ("probe_notes", "vouched", "slots", "ended")}
_LINK_CREATE, _OBJ_PIN, _SK_LOOKUP = 28, 6, 36


class Former:
    """One instance below BPFDIR/LAYOUT. `pins`: of the pod."""

    def __init__(self, bpf_dir: Path, uid: str, pair: Pair, scratch: Path, layout: str = "v1") -> None:
        self.pins = bpf_dir / layout / uid
        self.pair = pair
        self._netns = pair.pod_path
        node = bpf_dir / layout / "node"
        node.mkdir(parents=True, exist_ok=True)
        object_file = scratch / f"layout_{layout}.o"
        object_file.write_bytes(lzma.decompress((FOLDER / f"{object_file.name}.xz").read_bytes()))
        bpftool = shutil.which("bpftool") or "/usr/sbin/bpftool"
        known = [name for name in SHARED[layout] if (node / name).exists()]
        taken = [word for name in known for word in ("map", "name", name, "pinned", str(node / name))]
        run(bpftool, "prog", "loadall", str(object_file), str(self.pins), *taken, "pinmaps", str(self.pins))
        for name in SHARED[layout]:
            if name in known:
                (self.pins / name).unlink(missing_ok=True)
            else:
                (self.pins / name).rename(node / name)
        with self._map("addresses") as found:
            for address in pair.addresses().split(","):
                found.update(packed(address), b"\1")

    def _map(self, name: str) -> Map:
        return Map(str(self.pins / name).encode())

    def mode(self, mode: int) -> None:
        """Writes the mode; attaches what is not attached."""
        with self._map("pod") as pod:
            pod.update(struct.pack("I", 0), struct.pack("IIQQ", mode, 0, os.stat(self._netns).st_ino, 0))
        if (self.pins / "link").exists():
            return
        inside = ("nsenter", f"--net={self._netns}")
        run(*inside, "sysctl", "-qw", "net.ipv4.conf.lo.accept_local=1")
        for family in ("-4", "-6"):
            run(*inside, "ip", family, "route", "add", "local", "default", "dev", "lo", "table", "100")
            run(*inside, "ip", family, "rule", "add", "fwmark", "0x111", "pref", "32764", "lookup", "100")
        with self._map("steer") as program, open(self._netns) as netns:
            link = Map._call(_LINK_CREATE, struct.pack("IIII", program.fd, netns.fileno(), _SK_LOOKUP, 0))
            path = ctypes.create_string_buffer(str(self.pins / "link").encode())
            Map._call(_OBJ_PIN, struct.pack("QII", ctypes.addressof(path), link, 0))
            os.close(link)
        for device in ("lo", "eth0"):
            run(*inside, "tc", "qdisc", "add", "dev", device, "clsact")
        for device, side, name in (
            ("lo", "ingress", "in_lo"),
            ("lo", "egress", "out_lo"),
            ("eth0", "ingress", "in_eth"),
            ("eth0", "egress", "out_eth"),
        ):
            where = ("dev", device, side, "pref", "1", "handle", "1", "protocol", "all")
            run(*inside, "tc", "filter", "add", *where, "bpf", "direct-action", "object-pinned", str(self.pins / name))

    def maps(self) -> tuple[int, int]:
        """File descriptors of `listeners` and `engine_sk`, the caller's."""
        with self._map("listeners") as one, self._map("engine_sk") as two:
            return os.dup(one.fd), os.dup(two.fd)

    def remove(self) -> None:
        """Takes the pins away, where they still are; what is attached ends with the namespace."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.pins.parent)
