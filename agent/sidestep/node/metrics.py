"""What the agent counts, and the page of /metrics: the agent's families, then the engine's, in one complete exposition.

Names and labels are those of reference/ztunnel.md 8.1; what istio does not have begins with `sidestep_`. Written by
hand: the client library costs 10 MB and knows nothing of the engine's text.
"""

import os
import resource
import time
from collections.abc import Iterable, Mapping

from sidestep import __version__

OPENMETRICS = "application/openmetrics-text"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"

Labels = tuple[tuple[str, str], ...]

FAMILIES: dict[str, tuple[str, str]] = {
    "istio_build": ("gauge", "Version of this component"),
    "istio_xds_connection_terminations_total": ("counter", "Ended connections to the xDS server, by reason (unstable)"),
    "istio_xds_message_total": ("counter", "Responses received by xDS, by type (unstable)"),
    "istio_xds_message_bytes_total": ("counter", "Bytes of resources received by xDS, by type (unstable)"),
    "workload_manager_active_proxy_count": ("gauge", "Pods of this node that are enrolled (unstable)"),
    "workload_manager_pending_proxy_count": ("gauge", "Pods that should be enrolled and are not yet (unstable)"),
    "workload_manager_proxies_started_total": ("counter", "Pods that were enrolled (unstable)"),
    "workload_manager_proxies_stopped_total": ("counter", "Pods that were un-enrolled (unstable)"),
    "sidestep_reconcile_steps_total": ("counter", "Steps that were performed for pods, by step and result"),
    "sidestep_capture_repairs_total": ("counter", "Programs found detached and put back"),
    "sidestep_capture_packets_total": ("counter", "Decisions of the programs in the pods, by decision"),
    "sidestep_probe_syns_total": ("counter", "SYNs of the kubelet to enrolled pods: noted, refused_port, full"),
    "sidestep_pods_raw": ("gauge", "Enrolled pods that may send raw packets past capture (docs/threat-model.md)"),
    "sidestep_identities": ("gauge", "Certificates of this node, by state"),
    "sidestep_certificate_requests_total": ("counter", "Requests to the certificate authority, by result"),
    "sidestep_cni_requests_total": ("counter", "Calls of the CNI plugin, by command and result"),
    "sidestep_engine_connects_total": ("counter", "Connections made to the engine"),
    "sidestep_engine_up": ("gauge", "1 while the engine answers"),
    "sidestep_same_node_native": ("gauge", "1 where connections between two pods of this node may pass natively"),
    "sidestep_agent_log_lines_dropped_total": ("counter", "Log lines of the agent lost because nobody read them"),
    "process_open_fds": ("gauge", "Open file descriptors of the agent"),
    "process_max_fds": ("gauge", "Limit of open file descriptors of the agent"),
    "process_resident_memory_bytes": ("gauge", "Resident memory of the agent"),
    "process_cpu_seconds_total": ("counter", "CPU time of the agent"),
    "process_start_time_seconds": ("gauge", "When the agent started, seconds since the epoch"),
}


class Metrics:
    """Counters and gauges by family and labels. Only names in FAMILIES exist; anything else is a KeyError."""

    def __init__(self) -> None:
        self._values: dict[str, dict[Labels, float]] = {name: {} for name in FAMILIES}
        self._started_s = time.time()
        self.set("istio_build", 1, component="ztunnel", tag=__version__)
        for name in ("workload_manager_proxies_started_total", "workload_manager_proxies_stopped_total"):
            self.add(name, 0)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raises a counter."""
        values = self._values[name]
        key = tuple(sorted(labels.items()))
        values[key] = values.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge, or a counter that is counted elsewhere."""
        self._values[name][tuple(sorted(labels.items()))] = value

    def value(self, name: str, **labels: str) -> float:
        """The value, 0 where there is none yet."""
        return self._values[name].get(tuple(sorted(labels.items())), 0)

    def forget(self, name: str) -> None:
        """Drops every value of a gauge that is set anew as a whole."""
        self._values[name].clear()

    def render(self, engine: str, openmetrics: bool) -> str:
        """The page. `engine` is the engine's text, "" while it does not answer."""
        self._process()
        lines: list[str] = []
        for name, (kind, text) in FAMILIES.items():
            if self._values[name]:
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                lines += [_sample(name, labels, value) for labels, value in sorted(self._values[name].items())]
        lines += [line for line in engine.splitlines() if line and line != "# EOF"]
        return "\n".join([*_headed(lines, openmetrics), "# EOF", ""])

    def _process(self) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.set("process_open_fds", len(os.listdir("/proc/self/fd")) - 1)
        self.set("process_max_fds", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.set("process_cpu_seconds_total", round(usage.ru_utime + usage.ru_stime, 2))
        self.set("process_start_time_seconds", round(self._started_s, 2))
        with open("/proc/self/statm") as statm:
            self.set("process_resident_memory_bytes", int(statm.read().split()[1]) * resource.getpagesize())


def _headed(lines: Iterable[str], openmetrics: bool) -> list[str]:
    """The two formats name a counter's family differently: OpenMetrics without `_total`, the older text with it."""
    all_lines = list(lines)
    counters = {
        line.split(" ")[2].removesuffix("_total")
        for line in all_lines
        if line.startswith("# TYPE ") and line.endswith(" counter")
    }
    done = []
    for line in all_lines:
        if line.startswith(("# HELP ", "# TYPE ")):
            mark, word, name, rest = line.split(" ", 3)
            if name.removesuffix("_total") in counters:
                name = name.removesuffix("_total") + ("" if openmetrics else "_total")
            line = f"{mark} {word} {name} {rest}"
        done.append(line)
    return done


def _sample(name: str, labels: Labels, value: float) -> str:
    number = str(int(value)) if value == int(value) else repr(value)
    if not labels:
        return f"{name} {number}"
    return f"{name}{{{','.join(f'{key}={quote(text)}' for key, text in labels)}}} {number}"


def quote(text: str) -> str:
    """A label's value in quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def summed(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Adds the counters of all pods, by decision."""
    total: dict[str, int] = {}
    for each in counters:
        for name, value in each.items():
            total[name] = total.get(name, 0) + value
    return total
