"""`make demo`: a shop of real programs joins the mesh while its customers keep buying, and leaves it again.

What is shown is what happened: every figure is measured here, and a step that does not come out as promised ends the
demo with exit status 1. Uses the project's own Kubernetes client, so no kubectl is needed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sidestep.kube.client import KubeClient
from sidestep.lab.link import HBONE_PORT, Flow, Tap, tls_bytes, violations

SIDESTEP = str(Path(sys.executable).with_name("sidestep"))
HERE = Path(__file__).parent
LABEL = "istio.io/dataplane-mode"
ANNOTATION = "ambient.istio.io/redirection"
LEARN_S = 1.0  # the control plane has told every node by then that the pods speak HBONE
WORDS = (b"corner shop", b"SELECT name, price_cents FROM products")
BOLD, DIM, GREEN, RED, PLAIN = (
    ("\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else [""] * 5
)


class DemoError(Exception):
    """Something did not come out as promised; the text says what."""


def say(text: str = "") -> None:
    print(text, flush=True)


def step(letter: str, text: str) -> None:
    say(f"\n{BOLD}({letter}) {text}{PLAIN}")


def good(text: str) -> None:
    say(f"    {GREEN}ok{PLAIN}  {text}")


def sidestep(*args: str) -> str:
    """Runs a sidestep command, returns its output; raises DemoError with what it said."""
    done = subprocess.run([SIDESTEP, *args], capture_output=True, text=True, timeout=180)
    if done.returncode != 0:
        raise DemoError(f"`sidestep {' '.join(args)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Shop:
    """The lab that the shop runs in, seen through the commands that a person would use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status: dict[str, Any] = json.loads(sidestep("lab", "status", "--name", name, "--json"))
        self.kubeconfig = sidestep("lab", "kubeconfig", "--name", name).strip()

    def tap(self) -> Tap:
        """A witness on node1's end of the link between the nodes."""
        link = self.status["nodes"][0]["link"]
        return Tap(link["netns"], link["interface"])

    def ask(self, call: "Callable[[KubeClient], Any]") -> Any:
        """One question to the Kubernetes API."""

        async def run() -> Any:
            async with KubeClient.from_config(self.kubeconfig) as client:
                return await call(client)

        return asyncio.run(run())

    def pods(self) -> list[dict[str, Any]]:
        """The shop's pods."""
        items: list[dict[str, Any]] = self.ask(lambda client: client.list("/api/v1/namespaces/shop/pods"))["items"]
        return items

    def label(self, value: str | None) -> None:
        """Sets or removes the label that decides."""
        patch = {"metadata": {"labels": {LABEL: value}}}
        self.ask(lambda client: client.patch("/api/v1/namespaces/shop", patch))

    def load(self) -> dict[str, Any]:
        """The customers' last report."""
        name = next(pod["metadata"]["name"] for pod in self.pods() if pod["metadata"]["name"].startswith("load-"))
        lines = sidestep("lab", "logs", "--name", self.name, f"shop/{name}").strip().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}

    def lives(self) -> dict[str, tuple[str, int]]:
        """Pod -> (UID, restarts): what must not change."""
        return {
            pod["metadata"]["name"]: (
                pod["metadata"]["uid"],
                sum(status["restartCount"] for status in pod["status"].get("containerStatuses", [])),
            )
            for pod in self.pods()
        }


class Psql:
    """A psql session that stays open: asks, and waits for the answer."""

    def __init__(self, shop: Shop) -> None:
        api = next(pod["metadata"]["name"] for pod in shop.pods() if pod["metadata"]["name"].startswith("api-"))
        database = ["psql", "-X", "-q", "-t", "-A", "-h", "db.shop.svc.cluster.local", "-U", "shop", "shop"]
        self._process = subprocess.Popen(
            [SIDESTEP, "lab", "exec", "--name", shop.name, f"shop/{api}", "--", *database],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        self.backend = self.ask("SELECT pg_backend_pid()")

    def ask(self, query: str) -> str:
        """One line of answer. Raises DemoError when the session is gone or silent for 20 s."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(20, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(query + ";\n")
            answer = self._process.stdout.readline().strip()
        except OSError as error:
            raise DemoError(f"the psql session broke: {error}") from error
        finally:
            timer.cancel()
        if not answer:
            raise DemoError("the psql session ended")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=5)
        self._process.kill()
        self._process.wait()


def wait_for(what: str, true: Callable[[], bool], seconds: float = 60) -> float:
    """Polls until true; returns the seconds it took. Raises DemoError after the deadline."""
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > seconds:
            raise DemoError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - started


def settle(shop: Shop, requests: int = 200) -> None:
    """Lets the customers make that many more requests."""
    before = shop.load()["requests"]
    wait_for(f"{requests} requests", lambda: shop.load()["requests"] - before >= requests)


def watch(shop: Shop, requests: int = 150) -> list[Flow]:
    """Taps the link while the customers make that many requests; the connections opened meanwhile."""
    with shop.tap() as tap:
        settle(shop, requests)
        return tap.flows(opened_only=True)


def ports(flows: list[Flow]) -> str:
    seen = Counter(flow.destination.port for flow in flows if flow.syn)
    return ", ".join(f"{count} to port {port}" for port, count in seen.most_common(6))


def read_aloud(flows: list[Flow]) -> int:
    """Shows the words that were readable; returns how many of WORDS were."""
    found = 0
    for word in WORDS:
        for flow in flows:
            at = flow.fragments().find(word)
            if at >= 0:
                text = flow.fragments()[max(0, at - 24) : at + len(word) + 40]
                shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in text)
                say(f"    {DIM}{flow.source} -> {flow.destination}{PLAIN}  {shown}")
                found += 1
                break
    return found


def redirected(shop: Shop) -> int:
    return sum(pod["metadata"].get("annotations", {}).get(ANNOTATION) == "enabled" for pod in shop.pods())


def nothing_lost(shop: Shop, lives: dict[str, tuple[str, int]], psql: Psql, reconnects: int) -> None:
    """Checks (c): no pod restarted, no request failed, the old sessions go on."""
    load = shop.load()
    if shop.lives() != lives:
        raise DemoError(f"a pod was restarted: {shop.lives()} instead of {lives}")
    good(f"no pod was restarted ({len(lives)} pods, the same UIDs, no restart)")
    if load["failed"] or load["reconnects"] != reconnects:
        raise DemoError(f"the customers lost something: {load}")
    good(f"{load['requests']} requests so far, 0 failed; {reconnects} kept connections, none broken")
    if psql.ask("SELECT pg_backend_pid()") != psql.backend:
        raise DemoError("the psql session is another one")
    good(f"the psql session from before goes on: still backend {psql.backend}")


def play(shop: Shop) -> None:
    """The demo's five steps."""
    wait_for("customers", lambda: shop.load().get("requests", 0) > 50)
    step("a", "Plain: what a reader of the link between the nodes sees")
    flows = watch(shop)
    readable = read_aloud(flows)
    if readable != len(WORDS) or not violations(flows, WORDS):
        raise DemoError("the words were expected on the link before the mesh, and were not seen")
    good(f"{sum(flow.syn for flow in flows)} connections opened ({ports(flows)}), all readable")
    psql = Psql(shop)
    try:
        say(f"    a psql session is opened now and stays open (backend {psql.backend})")
        lives, reconnects = shop.lives(), shop.load()["reconnects"]

        step("b", f"kubectl label namespace shop {LABEL}=ambient")
        with shop.tap() as tap:
            shop.label("ambient")
            seconds = wait_for("enrolment", lambda: redirected(shop) == len(lives))
            enrolled = time.monotonic()
            good(f"{len(lives)} pods enrolled after {seconds:.1f} s")

            step("c", "Nothing was restarted, nothing was lost")
            nothing_lost(shop, lives, psql, reconnects)

            step("d", "The same link, connections opened since")
            settle(shop)
            flows = [flow for flow in tap.flows(opened_only=True) if flow.since > enrolled + LEARN_S]
            tunnels = [flow for flow in tap.flows(opened_only=True) if HBONE_PORT in flow.ports()]
        bad = violations([*flows, *tunnels], WORDS)
        if bad or not tls_bytes(tunnels):
            raise DemoError(
                "in clear text on the link: " + "; ".join(f"{found.kind} {found.detail}" for found in bad[:5])
            )
        good(
            f"{sum(flow.syn for flow in tunnels)} tunnels, each TLS 1.3 to port {HBONE_PORT}, carried "
            f"{tls_bytes(tunnels)} bytes; nothing else was opened; not one word readable"
        )
        table(shop, "certificates")
        table(shop, "connections")

        step("e", f"kubectl label namespace shop {LABEL}-")
        shop.label(None)
        seconds = wait_for("un-enrolment", lambda: redirected(shop) == 0)
        good(f"{len(lives)} pods out of the mesh after {seconds:.1f} s")
        wait_for("clear text again", lambda: bool(read_aloud_quietly(watch(shop, 60))))
        good("the link is readable again")
        nothing_lost(shop, lives, psql, reconnects)
    finally:
        psql.close()


def read_aloud_quietly(flows: list[Flow]) -> list[bytes]:
    return [word for word in WORDS if any(word in flow.fragments() for flow in flows)]


def table(shop: Shop, noun: str, rows: int = 9) -> None:
    """The first lines of what a noun prints about this lab; there may be others on the machine."""
    lines = sidestep(noun, "--lab", shop.name).splitlines()
    say(f"    {DIM}$ sidestep {noun}{PLAIN}")
    for line in lines[:rows]:
        say(f"    {line[:150]}")
    if len(lines) > rows:
        say(f"    {DIM}... {len(lines) - rows} more{PLAIN}")


@contextlib.contextmanager
def lab(name: str, keep: bool, same_node: str | None) -> Iterator[Shop]:
    """The shop, opened and (unless kept) closed again, whatever happens."""
    up = [SIDESTEP, "lab", "up", "--name", name, "--nodes", "2", *(["--same-node", same_node] if same_node else [])]
    for manifest in sorted(HERE.glob("*.yaml")):
        up += ["-f", str(manifest)]
    try:
        if subprocess.run(up).returncode != 0:
            raise DemoError("the lab did not come up (see above)")
        yield Shop(name)
    finally:
        if keep:
            say(f"\nThe shop stays open. `export KUBECONFIG=$({SIDESTEP} lab kubeconfig --name {name})`,")
            say(f"`{SIDESTEP} status`, `{SIDESTEP} lab exec --name {name} shop/POD -- CMD`;")
            say(f"when done: `{SIDESTEP} lab down --name {name}`")
        else:
            subprocess.run([SIDESTEP, "lab", "down", "--name", name], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the shop running")
    parser.add_argument("--name", default="demo", help="name of the lab")
    parser.add_argument("--same-node", choices=("direct", "native", "mtls"), help="as of `sidestep lab up`")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("demo: needs root (network namespaces, eBPF): run `sudo make demo`", file=sys.stderr)
        return 1
    started = time.monotonic()
    try:
        with lab(args.name, args.keep, args.same_node) as shop:
            ready = time.monotonic()
            play(shop)
            say(
                f"\n{BOLD}Done{PLAIN}: set-up {ready - started:.0f} s, the five steps {time.monotonic() - ready:.0f} s."
            )
    except DemoError as error:
        # On one line: what a command says has a line for each node, what libpq says has several.
        said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        print(f"\n{RED}demo: {said}{PLAIN}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
