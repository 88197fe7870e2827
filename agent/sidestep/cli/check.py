"""`sidestep check`: can this machine run sidestep? Looks, and touches nothing that stays.

Each line is one requirement: `ok`, `warn` (works, with a limit that the line names) or `FAIL` (will not work; the
line says what to do).
"""

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

CAPABILITIES = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW", 21: "CAP_SYS_ADMIN", 39: "CAP_BPF"}
AGENT_PORTS = (15000, 15020, 15021)
BPF_FS_MAGIC = 0xCAFE4A11


@dataclass(frozen=True, slots=True)
class Finding:
    """One requirement: `level` is ok, warn or fail; `advice` is empty when there is nothing to do."""

    name: str
    level: str
    found: str
    advice: str = ""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `check`."""
    parser = subparsers.add_parser("check", help="can this machine run sidestep? (touches nothing)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 when one of them is a failure."""
    found = findings()
    if args.json:
        json.dump([asdict(finding) for finding in found], sys.stdout, indent=2)
        print()
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            level = "FAIL" if finding.level == "fail" else finding.level
            print(f"{level:<4}  {finding.name:<{width}}  {finding.found}")
            if finding.advice:
                print(f"      {'':<{width}}  -> {finding.advice}")
    return 1 if any(finding.level == "fail" for finding in found) else 0


def findings() -> list[Finding]:
    """Everything that `check` looks at, in the order in which it matters."""
    found = [kernel(), *privileges(), bpffs()]
    found += bpf_features()
    found += [cgroup2(), kubelet(), aes_gcm(), descriptors(), *tools(), *other_meshes(), *ports()]
    return found


def kernel() -> Finding:
    """Kernel version: 5.15 is what the design aims at, 6.18 is what was run."""
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    if numbers < (5, 15):
        return Finding("kernel", "fail", release, "sidestep needs Linux 5.15 or newer")
    if numbers < (6, 18):
        return Finding("kernel", "warn", release, "should work; was run on 6.18 only")
    return Finding("kernel", "ok", release)


def privileges() -> list[Finding]:
    """Effective capabilities of this process, by name."""
    status = Path("/proc/self/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    missing = [name for bit, name in CAPABILITIES.items() if not mask >> bit & 1]
    if os.geteuid() != 0:
        return [Finding("privileges", "fail", f"uid {os.geteuid()}", "run as root")]
    if missing:
        return [Finding("privileges", "fail", "missing " + ", ".join(missing), "grant these capabilities")]
    return [Finding("privileges", "ok", "root, with " + ", ".join(CAPABILITIES.values()))]


def bpffs() -> Finding:
    """The BPF file system, where programs and maps are pinned."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    if any(line.split()[1:3] == ["/sys/fs/bpf", "bpf"] for line in mounts):
        return Finding("bpffs", "ok", "/sys/fs/bpf")
    return Finding("bpffs", "fail", "not mounted", "mount -t bpf bpf /sys/fs/bpf")


def cgroup2() -> Finding:
    """A cgroup2 mount: needed to tell the kubelet's probes, not for traffic."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Finding("cgroup2", "ok", line.split()[1])
    return Finding(
        "cgroup2", "warn", "not mounted", "the lab's probes need it: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


def kubelet() -> Finding:
    """The kubelet's own cgroup2 directory, by which its probes are told from other clear text."""
    try:
        from sidestep.node.probes import NoCgroup, search
    except ImportError as error:
        return Finding("kubelet", "warn", f"the extension is not built: {error}", "run `make build`")
    try:
        return Finding("kubelet", "ok", f"in {search().directory}")
    except NoCgroup as error:
        if error.absent:
            return Finding("kubelet", "ok", "none runs here")
        return Finding("kubelet", "warn", str(error), "give the agent --kubelet-cgroup DIR, else STRICT refuses probes")
    except OSError as error:
        return Finding("kubelet", "warn", str(error), "ask again")


def aes_gcm() -> Finding:
    """What seals TLS records: no reason to fail or to warn, but a fifth of the engine's work between nodes."""
    try:
        import sidestep._tunnel as _tunnel
    except ImportError as error:
        return Finding("AES-GCM", "warn", f"the extension is not built: {error}", "run `make build`")
    return Finding("AES-GCM", "ok", _tunnel.ffi.string(_tunnel.lib.tunnel_aes_gcm()).decode())


def descriptors() -> Finding:
    """The hard limit of open files: each connection of a pod costs the engine up to two."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 65536:
        return Finding(
            "open files", "warn", f"at most {hard}", f"the engine refuses connections beyond {hard * 9 // 10}"
        )
    return Finding("open files", "ok", "unlimited" if hard == resource.RLIM_INFINITY else str(hard))


def tools() -> list[Finding]:
    """What the lab uses; a Kubernetes node needs none of it."""
    found = []
    cni = Path("/usr/lib/cni")
    missing = [name for name in ("bridge", "ptp", "host-local", "loopback") if not (cni / name).exists()]
    for name, package in (("ip", "iproute2"), ("nft", "nftables"), ("dnsmasq", "dnsmasq-base")):
        if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            missing.append(f"{name} ({package})")
    if missing:
        found.append(
            Finding("lab tools", "warn", "missing " + ", ".join(missing), "make setup installs them; for the lab only")
        )
    else:
        found.append(Finding("lab tools", "ok", "ip, nft, dnsmasq, CNI base plugins"))
    return found


def other_meshes() -> list[Finding]:
    """Another mesh's CNI plugin on this node would capture the same pods."""
    found = []
    for conflist in sorted(Path("/etc/cni/net.d").glob("*.conf*")):
        try:
            text = conflist.read_text(errors="replace")
        except OSError:
            continue
        for name in ("istio-cni", "linkerd-cni", "cilium-cni", "kuma-cni"):
            if f'"{name}"' in text:
                level = "warn" if name == "cilium-cni" else "fail"
                advice = "chaining after Cilium was not tried" if level == "warn" else "take it out of the chain first"
                found.append(Finding("other meshes", level, f"{name} in {conflist}", advice))
    return found or [Finding("other meshes", "ok", "none in /etc/cni/net.d")]


def ports() -> list[Finding]:
    """The agent's ports on this machine."""
    import socket

    taken = []
    for port in AGENT_PORTS:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("::", port))
            except OSError:
                taken.append(str(port))
    if taken:
        return [
            Finding(
                "ports", "warn", f"taken: {', '.join(taken)}", "an agent runs here already, or something else has them"
            )
        ]
    return [Finding("ports", "ok", ", ".join(map(str, AGENT_PORTS)) + " are free")]


def bpf_features() -> list[Finding]:
    """Every program type and helper, loaded once for real (bpf/loader.c, capture_probe)."""
    try:
        from sidestep.node.capture import native_problem, probe
    except ImportError as error:
        return [Finding("BPF", "fail", f"the extension is not built: {error}", "run `make build`")]
    found = [
        Finding(f"BPF {name}", "ok" if not problem else "fail", problem or "loads", advice if problem else "")
        for name, problem, advice in probe()
    ]
    lacks = native_problem()
    advice = "agents use --same-node direct instead of native: a kernel with BTF and CONFIG_INET_DIAG_DESTROY"
    found.append(Finding("native flows", "warn" if lacks else "ok", lacks or "loads", advice if lacks else ""))
    return found
