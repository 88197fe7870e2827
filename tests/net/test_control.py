"""The control plane as a process, against the lab's API server, with independent clients of its protocols."""

import asyncio
import base64
import itertools
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from sidestep.control import authority
from sidestep.kube.client import KubeClient, KubeError
from sidestep.wire.pb import authorization_pb2 as pb
from sidestep.wire.pb import workload_pb2
from tests.harness import control as harness
from tests.harness.authorities import with_intermediate
from tests.harness.control import ADDRESS, AUTHORIZATION, HANG_S, SYSTEM, Cluster, Follower, bearer, certificate
from tests.harness.policies import STATIC, shape

POD = "Kubernetes//Pod/shop/web-1"
WEB = "shop/web.shop.svc.cluster.local"
URI = "spiffe://cluster.local/ns/shop/sa/web"
REDIRECTION = "ambient.istio.io/redirection"
SERVICE = {
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "web"}]},
}
PODS = "/api/v1/namespaces/shop/pods"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """An API server, and a control plane that is not started."""
    with harness.cluster(tmp_path) as made:
        yield made


class Mesh:
    """A cluster with one node, its agent's token, and a channel to the control plane."""

    def __init__(self, cluster: Cluster, kube: KubeClient, token: str) -> None:
        self.cluster = cluster
        self.kube = kube
        self.token = token
        self.channels: list[grpc.aio.Channel] = []

    async def channel(self, name: str = "istiod.istio-system.svc") -> grpc.aio.Channel:
        """A new connection."""
        made = harness.channel(self.cluster.address, await self.root(), name)
        self.channels.append(made)
        return made

    async def root(self, namespace: str = SYSTEM) -> bytes:
        """The root as published; waited for."""
        while True:
            try:
                return await harness.root(self.kube, namespace)
            except KubeError as error:
                assert error.status == 404
                await asyncio.sleep(0.02)

    async def follow(self, url: str = ADDRESS, **first: Any) -> Follower:
        """A stream that has had its first response."""
        follower = Follower(await self.channel(), bearer(self.token))
        await follower.ask(url, **first)
        await follower.take()
        return follower

    async def status(self) -> Any:
        """The page of port 15014."""
        return json.loads(await asyncio.to_thread(self.cluster.page, "/status"))


def on_mesh(cluster: Cluster, test: Callable[[Mesh], Awaitable[None]]) -> None:
    """Starts the control plane and runs a coroutine under a hang guard."""

    async def whole() -> None:
        async with asyncio.timeout(HANG_S), KubeClient.from_config(cluster.kubeconfig) as kube:
            for name in (SYSTEM, "shop"):
                await harness.add_namespace(kube, name)
            await harness.add_node(kube, "node1", "10.0.0.1", topology_kubernetes_io__zone="z1")
            await harness.add_account(kube, "shop", "web")
            mesh = Mesh(cluster, kube, await harness.add_agent(kube, "node1", "10.0.0.1"))
            await asyncio.to_thread(cluster.start)
            try:
                await test(mesh)
            finally:
                for each in mesh.channels:
                    await each.close(None)

    asyncio.run(whole())


async def add_web(mesh: Mesh, name: str = "web-1", *addresses: str, **more: Any) -> None:
    """A pod of account web."""
    ips = addresses or ("10.9.0.1", "fd00::1")
    await harness.add_pod(mesh.kube, "shop", name, "node1", *ips, account="web", labels={"app": "web"}, **more)


async def enrol(mesh: Mesh, name: str = "web-1", value: str | None = "enabled") -> None:
    """Sets the annotation as an agent does."""
    await mesh.kube.patch(f"{PODS}/{name}", {"metadata": {"annotations": {REDIRECTION: value}}})


def hbone(name: str = POD) -> Callable[[dict[str, Any]], bool]:
    return lambda held: name in held and held[name].workload.tunnel_protocol == workload_pb2.HBONE


def test_objects_become_addresses_and_follow_them(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        follower = await mesh.follow()
        assert POD not in follower.addresses
        await add_web(mesh)
        await mesh.kube.create("/api/v1/namespaces/shop/services", SERVICE)
        await follower.until(lambda held: POD in held and WEB in held[POD].workload.services and WEB in held)
        record = follower.addresses[POD].workload
        assert record.node == "node1" and record.service_account == "web" and record.locality.zone == "z1"
        assert [len(address) for address in record.addresses] == [4, 16]
        [port] = record.services[WEB].ports
        assert (port.service_port, port.target_port) == (80, 8080)
        assert record.tunnel_protocol == workload_pb2.NONE
        await enrol(mesh)
        await follower.until(hbone())
        await enrol(mesh, value=None)
        await follower.until(lambda held: not hbone()(held))
        await harness.set_pod(mesh.kube, "shop", "web-1", "10.9.0.1", ready=False)
        await follower.until(lambda held: held[POD].workload.status == workload_pb2.UNHEALTHY)
        await mesh.kube.delete(f"{PODS}/web-1", grace_s=0)
        await follower.until(lambda held: POD not in held)
        await mesh.kube.delete("/api/v1/namespaces/shop/services/web")
        await follower.until(lambda held: WEB not in held)

    on_mesh(cluster, test)


def test_policies_are_an_empty_set_that_is_answered(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        follower = await mesh.follow(AUTHORIZATION)
        [response] = follower.pushes
        assert response.type_url == AUTHORIZATION and not response.resources and not response.removed_resources

    on_mesh(cluster, test)


DENY = {
    "action": "DENY",
    "selector": {"matchLabels": {"app": "web"}},
    "rules": [{"to": [{"operation": {"ports": ["80"]}}]}],
}
AP = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies"
PA = "/apis/security.istio.io/v1/namespaces/shop/peerauthentications"


async def condition(mesh: Mesh, path: str, good: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The condition of a policy, once it is good."""
    while True:
        status = (await mesh.kube.get(path)).get("status") or {}
        for each in status.get("conditions") or ():
            if each["type"] == "ZtunnelAccepted" and good(each):
                return dict(each)
        await asyncio.sleep(0.02)


def test_policies_are_served_and_followed(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        await add_web(mesh)
        addresses, follower = await mesh.follow(), await mesh.follow(AUTHORIZATION)
        await addresses.until(lambda held: POD in held)
        await mesh.kube.create(AP, {"metadata": {"name": "p"}, "spec": DENY})
        await follower.ruled(lambda held: "shop/p" in held)
        policy = follower.policies["shop/p"]
        assert (policy.name, policy.namespace, policy.action, policy.scope) == (
            "p",
            "shop",
            pb.DENY,
            pb.WORKLOAD_SELECTOR,
        )
        assert shape(policy) == [[[{"destination_ports": [80]}]]] and follower.pushes[-1].type_url == AUTHORIZATION
        await addresses.until(lambda held: list(held[POD].workload.authorization_policies) == ["shop/p"])

        first, pushes = follower.versions["shop/p"], len(addresses.pushes)
        await mesh.kube.patch(f"{AP}/p", {"spec": {"rules": [{"to": [{"operation": {"ports": ["81"]}}]}]}})
        await follower.ruled(lambda held: shape(held["shop/p"]) == [[[{"destination_ports": [81]}]]])
        assert follower.versions["shop/p"] != first
        held = dict(follower.versions)
        follower.call.cancel()
        [response] = (await mesh.follow(AUTHORIZATION, initial_resource_versions=held)).pushes
        assert not response.resources and not response.removed_resources  # nothing new for who comes back
        [response] = (await mesh.follow(AUTHORIZATION, initial_resource_versions=held | {"shop/gone": "1"})).pushes
        assert not response.resources and list(response.removed_resources) == ["shop/gone"]

        again = await mesh.follow(AUTHORIZATION, initial_resource_versions=held)
        await mesh.kube.create(PA, {"metadata": {"name": "q"}, "spec": {"mtls": {"mode": "STRICT"}}})
        await again.ruled(lambda held: STATIC in held)
        await addresses.until(lambda held: list(held[POD].workload.authorization_policies) == ["shop/p", STATIC])
        assert len(addresses.pushes) == pushes + 1  # the change of rules was none for workloads
        await mesh.kube.delete(f"{AP}/p")
        while "shop/p" not in again.pushes[-1].removed_resources:
            await again.take()
        await addresses.until(lambda held: list(held[POD].workload.authorization_policies) == [STATIC])
        await mesh.kube.delete(f"{PA}/q")
        while STATIC not in again.pushes[-1].removed_resources:
            await again.take()

    on_mesh(cluster, test)


def test_one_stream_gets_policies_before_the_workloads_that_name_them(cluster: Cluster) -> None:
    """To a client that has answered what came before: of each type one push at most is unanswered."""

    async def test(mesh: Mesh) -> None:
        async def answered(policies: int) -> None:
            def done(types: dict[str, Any]) -> bool:
                both = len(types) == 2 and not any(each["waiting"] for each in types.values())
                return both and types["authorization"]["held"] == policies

            while not any(done(each["types"]) for each in (await mesh.status())["streams"]):
                await asyncio.sleep(0.02)

        await add_web(mesh)
        follower = Follower(await mesh.channel(), bearer(mesh.token))
        await follower.ask(ADDRESS)
        await follower.ask(AUTHORIZATION)
        while POD not in follower.addresses or len({push.type_url for push in follower.pushes}) < 2:
            await follower.take()
        for number in range(20):
            await answered(number)
            spec = DENY | {"rules": []}
            await mesh.kube.create(AP, {"metadata": {"name": f"p{number}"}, "spec": spec})
            name = f"shop/p{number}"
            while name not in follower.addresses[POD].workload.authorization_policies:
                await follower.take()
                assert set(follower.addresses[POD].workload.authorization_policies) <= follower.policies.keys()

    on_mesh(cluster, test)


def test_what_is_not_enforced_is_said(cluster: Cluster) -> None:
    """In the object's status, in an Event, in the log, on the page; and what can be read goes on being served."""

    async def test(mesh: Mesh) -> None:
        other = {"type": "Other", "status": "True", "reason": "Else", "message": "not ours"}
        await add_web(mesh)
        follower = await mesh.follow(AUTHORIZATION)
        await mesh.kube.create(AP, {"metadata": {"name": "good"}, "spec": DENY})
        said = await condition(mesh, f"{AP}/good", lambda each: True)
        assert (said["status"], said["reason"], said["observedGeneration"]) == ("True", "Accepted", 1)

        spec = {"rules": [{}, {"to": [{"operation": {"methods": ["GET"]}}]}]}
        await mesh.kube.create(AP, {"metadata": {"name": "mixed"}, "spec": spec})
        said = await condition(mesh, f"{AP}/mixed", lambda each: True)
        assert (said["status"], said["reason"]) == ("False", "UnsupportedValue")
        assert said["message"].startswith("spec.rules[1]: NOT ENFORCED") and "methods" in said["message"]

        await mesh.kube.patch(f"{AP}/good/status", {"status": {"conditions": [other]}})
        await condition(mesh, f"{AP}/good", lambda each: True)  # written again, beside what others wrote
        await mesh.kube.patch(f"{AP}/good", {"spec": {"rules": [{"from": [{"source": {"ipBlocks": ["nowhere"]}}]}]}})
        said = await condition(mesh, f"{AP}/good", lambda each: bool(each["status"] == "False"))
        assert said["reason"] == "Invalid" and said["observedGeneration"] == 2
        assert "spec.rules[0].from[0].source.ipBlocks[0]: 'nowhere'" in said["message"]
        assert other in (await mesh.kube.get(f"{AP}/good"))["status"]["conditions"]
        await mesh.kube.create(AP, {"metadata": {"name": "last"}, "spec": {}})
        await follower.ruled(lambda held: "shop/last" in held)  # the news of all that has come
        assert shape(follower.policies["shop/good"]) == [[[{"destination_ports": [80]}]]]  # the last good version
        assert shape(follower.policies["shop/mixed"]) == [[]]

        events: list[Any] = []
        while {each["involvedObject"]["name"] for each in events} != {"good", "mixed"}:
            events = (await mesh.kube.list("/api/v1/namespaces/shop/events"))["items"]
            await asyncio.sleep(0.02)
        assert {(each["type"], each["reason"]) for each in events} == {("Warning", "NotEnforced")}
        assert {each["involvedObject"]["kind"] for each in events} == {"AuthorizationPolicy"}

        found = {each["name"]: each for each in (await mesh.status())["policies"]}
        assert found["good"]["selects"] == 1 and not found["good"]["accepted"] and found["good"]["action"] == "DENY"
        assert found["mixed"]["not_enforced"] and found["last"]["accepted"]
        page = (await asyncio.to_thread(mesh.cluster.page, "/metrics")).decode()
        assert 'sidestep_control_policies{accepted="false"} 2.0' in page
        assert mesh.cluster.control is not None
        lines = [line for line in mesh.cluster.control.text().splitlines() if " policy_not_enforced " in line]
        assert len(lines) == 2 and all("level=WARN" in line for line in lines)

        kept = f"/api/v1/namespaces/{SYSTEM}/configmaps/sidestep-policies"
        while (await mesh.status())["remembered"] != {"versions": 1, "failed": ""}:
            await asyncio.sleep(0.02)
        written = (await mesh.kube.get(f"{AP}/good"))["metadata"]["resourceVersion"]
        await asyncio.to_thread(mesh.cluster.restart)
        after = await mesh.follow(AUTHORIZATION)
        assert shape(after.policies["shop/good"]) == [[[{"destination_ports": [80]}]]]
        assert (await mesh.kube.get(f"{AP}/good"))["metadata"]["resourceVersion"] == written  # nothing to say anew

        await mesh.kube.delete(kept)
        await asyncio.to_thread(mesh.cluster.restart)  # the control: without what was kept it denies all
        after = await mesh.follow(AUTHORIZATION)
        assert shape(after.policies["shop/good"]) == [[]] and after.policies["shop/good"].action == pb.DENY
        said = await condition(mesh, f"{AP}/good", lambda each: "denies all" in each["message"])
        await mesh.kube.patch(f"{AP}/good", {"spec": DENY})
        await after.ruled(lambda held: shape(held["shop/good"]) == [[[{"destination_ports": [80]}]]])
        said = await condition(mesh, f"{AP}/good", lambda each: bool(each["status"] == "True"))
        assert said["message"] == "accepted" and said["observedGeneration"] == 3

    on_mesh(cluster, test)


def test_who_comes_back_gets_the_difference_only(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        for number in range(1, 6):
            await add_web(mesh, f"web-{number}", f"10.9.0.{number}")
        first = await mesh.follow()
        await first.until(lambda held: f"{POD[:-1]}5" in held)
        held = dict(first.versions)
        first.call.cancel()
        await enrol(mesh)
        await mesh.kube.delete(f"{PODS}/web-2", grace_s=0)
        probe = await mesh.follow()
        await probe.until(lambda now: hbone()(now) and f"{POD[:-1]}2" not in now)
        [response] = (await mesh.follow(initial_resource_versions=held)).pushes
        assert [each.name for each in response.resources] == [POD]
        assert list(response.removed_resources) == [f"{POD[:-1]}2"]

    on_mesh(cluster, test)


def test_a_new_control_plane_takes_nothing_away_that_is_there(cluster: Cluster) -> None:
    """kill -9, and a client that comes back with what it held: versions are of the content, so nothing is sent."""

    async def test(mesh: Mesh) -> None:
        await add_web(mesh)
        first = await mesh.follow()
        await first.until(lambda held: POD in held)
        await asyncio.to_thread(mesh.cluster.restart)
        [response] = (await mesh.follow(initial_resource_versions=first.versions)).pushes
        assert not response.resources and not response.removed_resources

    on_mesh(cluster, test)


def test_on_demand(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        await add_web(mesh)
        await add_web(mesh, "web-2", "10.9.0.2")
        probe = await mesh.follow()
        await probe.until(lambda held: f"{POD[:-1]}2" in held)
        follower = await mesh.follow(resource_names_subscribe=["*"], resource_names_unsubscribe=["*"])
        assert not follower.addresses
        await follower.ask(resource_names_subscribe=["/10.9.0.1", "/10.9.0.99"])
        response = await follower.take()
        assert set(follower.addresses) == {POD} and list(response.removed_resources) == ["/10.9.0.99"]
        assert list(response.resources[0].aliases) == ["/10.9.0.1", "/fd00::1"]

    on_mesh(cluster, test)


def test_a_client_that_does_not_read_delays_no_other(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        stuck = Follower(await mesh.channel(), bearer(mesh.token))
        await stuck.ask()
        await stuck.take(answer=False)
        live = await mesh.follow()
        for number in range(1, 31):
            await add_web(mesh, f"web-{number}", f"10.9.0.{number}")
            await live.until(lambda held, number=number: f"{POD[:-1]}{number}" in held)
        await stuck.ask(response_nonce=stuck.pushes[0].nonce)
        await stuck.until(lambda held: f"{POD[:-1]}30" in held)
        assert stuck.addresses.keys() == live.addresses.keys()
        assert len(stuck.pushes) < len(live.pushes)  # what changed meanwhile came together

    on_mesh(cluster, test)


def test_answers_are_shown(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        follower = Follower(await mesh.channel(), bearer(mesh.token))
        await follower.ask()
        await follower.take(error="x: refused for a test")
        await add_web(mesh)
        await follower.until(lambda held: POD in held)
        while True:
            [stream] = (await mesh.status())["streams"]
            if stream["types"]["address"]["acked"]:
                break
            await asyncio.sleep(0.02)
        assert stream["node"] == "node1" and stream["pod"] == "istio-system/ztunnel-node1"
        assert stream["types"]["address"]["refused"] == 1
        assert stream["types"]["address"]["reason"] == "x: refused for a test"
        page = (await asyncio.to_thread(mesh.cluster.page, "/metrics")).decode()
        assert 'sidestep_control_xds_answers_total{answer="nack",type="address"} 1.0' in page
        assert 'sidestep_control_streams_open{kind="delta"} 1.0' in page

    on_mesh(cluster, test)


async def refusal(mesh: Mesh, headers: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """How a stream with these headers ends."""
    return await ended(Follower(await mesh.channel(), headers))


async def ended(follower: Follower) -> grpc.StatusCode:
    """How a stream ends that nobody serves."""
    with pytest.raises(grpc.aio.AioRpcError):
        await follower.take()  # nothing is asked: a write to a stream that was just refused ends it as INTERNAL
    code: grpc.StatusCode = await follower.call.code()
    return code


def test_streams_ask_for_the_same_proof_as_certificates(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        pod = await harness.add_pod(mesh.kube, "shop", "web-1", "node1", "10.9.0.1", account="web")
        agent = await mesh.kube.get(f"/api/v1/namespaces/{SYSTEM}/pods/ztunnel-node1")
        codes = []
        for headers in (
            (),
            bearer("no.such.token"),
            bearer(await harness.token(mesh.kube, SYSTEM, "ztunnel", agent, "another-audience")),
            bearer(await harness.token(mesh.kube, SYSTEM, "ztunnel", None)),
            bearer(await harness.token(mesh.kube, "shop", "web", pod)),
        ):
            codes.append((await refusal(mesh, headers)).name)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await certificate(await mesh.channel(), headers, URI)
            assert caught.value.code().name == codes[-1]
        assert codes == ["UNAUTHENTICATED"] * 3 + ["PERMISSION_DENIED"] * 2
        await mesh.follow()  # and the good one is taken

    on_mesh(cluster, test)


def verified(chain: list[str], roots: bytes) -> x509.Certificate:
    """The leaf. Raises where it does not lead to those roots."""
    verifier = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(roots))).build_client_verifier()
    leaf, *between = [x509.load_pem_x509_certificate(each.encode()) for each in chain[:-1]]
    return verifier.verify(leaf, between).chain[0]


def test_certificates_before_and_after_a_crash_are_of_one_root(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        await add_web(mesh)
        before = await certificate(await mesh.channel(), bearer(mesh.token), URI)
        roots = await mesh.root()
        await asyncio.to_thread(mesh.cluster.restart)
        after = await certificate(await mesh.channel(), bearer(mesh.token), URI)
        assert before[-1] == after[-1] and (await mesh.root()) == roots
        for chain in (before, after):
            names = verified(chain, before[-1].encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
            assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == [URI]
        assert verified(before, roots) != verified(after, roots)

    on_mesh(cluster, test)


def rotation() -> list[dict[str, str]]:
    """The files of an authority through a change of its root: as it was, with the new root beside the old, with the new
    one signing, without the old. The new one has an intermediate, the first half of its chain is the CA itself.
    """
    now = time.time()
    old, new = authority.new("old.example", now), with_intermediate()
    both = old.roots_pem + new.roots_pem
    after = new.files()
    return [
        old.files(),
        old.files() | {"root-cert.pem": both},
        after | {"root-cert.pem": both},
        after,
    ]


def write(directory: Path, files: dict[str, str]) -> None:
    for name in authority.FILES:
        (directory / name).unlink(missing_ok=True)
        if files.get(name):
            (directory / name).write_text(files[name])


@pytest.mark.parametrize("kept", ["directory", "secret"])
def test_the_root_is_replaced_while_it_runs(tmp_path: Path, kept: str) -> None:
    """Whoever holds a certificate of one step and whoever holds one of the next trust each other; who connects trusts
    what was published before; and the process stays the same.
    """
    directory = tmp_path / "cacerts"
    directory.mkdir()
    steps = rotation()
    write(directory, steps[0])
    with harness.cluster(tmp_path, *(["--cacerts", str(directory)] if kept == "directory" else [])) as cluster:

        async def put(mesh: Mesh, files: dict[str, str]) -> None:
            if kept == "directory":
                await asyncio.to_thread(write, directory, files)
                return
            data = {name: base64.b64encode(files.get(name, "").encode()).decode() for name in authority.FILES}
            await mesh.kube.patch(f"/api/v1/namespaces/{SYSTEM}/secrets/sidestep-ca", {"data": data})

        async def test(mesh: Mesh) -> None:
            await add_web(mesh)
            assert mesh.cluster.control is not None
            process = mesh.cluster.control.popen.pid
            trusted = await mesh.root()
            if kept == "secret":  # its own root is the old one
                own = (await mesh.kube.get(f"/api/v1/namespaces/{SYSTEM}/secrets/sidestep-ca"))["data"]
                first = {name: base64.b64decode(own.get(name, "")).decode() for name in authority.FILES}
                both = first["root-cert.pem"] + steps[3]["root-cert.pem"]
                steps[:3] = [first, first | {"root-cert.pem": both}, steps[3] | {"root-cert.pem": both}]
            chains = []
            for files in steps:
                await put(mesh, files)
                want = x509.load_pem_x509_certificates(files["root-cert.pem"].encode())
                for namespace in (SYSTEM, "shop", "default"):
                    while x509.load_pem_x509_certificates(await mesh.root(namespace)) != want:
                        await asyncio.sleep(0.02)
                while True:  # who trusts what was published before is taken, by a fresh connection
                    channel = harness.channel(mesh.cluster.address, trusted)
                    mesh.channels.append(channel)
                    chain = await certificate(channel, bearer(mesh.token), URI)
                    if x509.load_pem_x509_certificates(chain[-1].encode()) == want and issuer(chain) == subject(files):
                        break
                    await asyncio.sleep(0.02)
                trusted = await mesh.root()
                chains.append(chain)
            assert [len(chain) for chain in chains] == [2, 2, 4, 4]
            for before, after in itertools.pairwise(chains):
                verified(before, after[-1].encode())
                verified(after, before[-1].encode())
            with pytest.raises(VerificationError):  # the control: without the steps between it does not go
                verified(chains[3], chains[0][-1].encode())

            status = (await mesh.status())["root"]
            assert status["problem"] == "" and [each["issues"] for each in status["roots"]] == [True]
            await put(mesh, steps[3] | {"ca-key.pem": steps[0]["ca-key.pem"]})
            while "not the key of" not in (await mesh.status())["root"]["problem"]:
                await asyncio.sleep(0.02)
            chain = await certificate(channel, bearer(mesh.token), URI)
            assert issuer(chain) == subject(steps[3]) and await mesh.root() == trusted
            assert mesh.cluster.control.popen.pid == process and mesh.cluster.control.popen.poll() is None
            log = mesh.cluster.control.text()
            assert " authority_not_taken level=WARN" in log and "has not heard" not in log

        on_mesh(cluster, test)


def issuer(chain: list[str]) -> x509.Name:
    return x509.load_pem_x509_certificate(chain[0].encode()).issuer


def subject(files: dict[str, str]) -> x509.Name:
    return x509.load_pem_x509_certificate(files["ca-cert.pem"].encode()).subject


def test_a_root_that_nobody_has_heard_of_is_warned_about(tmp_path: Path) -> None:
    directory = tmp_path / "cacerts"
    directory.mkdir()
    steps = rotation()
    write(directory, steps[0])
    with harness.cluster(tmp_path, "--cacerts", str(directory)) as cluster:

        async def test(mesh: Mesh) -> None:
            assert mesh.cluster.control is not None
            await asyncio.to_thread(write, directory, steps[3])
            while "has not heard of its root" not in mesh.cluster.control.text():
                await asyncio.sleep(0.02)

        on_mesh(cluster, test)


def test_a_pod_is_served_at_once_and_no_more_when_it_is_gone(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        channel = await mesh.channel()
        path = f"{PODS}/web-1"
        spec = {
            "nodeName": "node1",
            "serviceAccountName": "web",
            "containers": [{"name": "a", "image": "none", "command": ["sleep"]}],
        }
        await mesh.kube.create(PODS, {"metadata": {"name": "web-1"}, "spec": spec})
        assert len(await certificate(channel, bearer(mesh.token), URI)) == 2
        uid = (await mesh.kube.get(path))["metadata"]["uid"]
        await mesh.kube.delete(path, grace_s=0, uid=uid)
        follower = await mesh.follow()  # the news has arrived when a later one has
        await add_web(mesh, "other", "10.9.0.9")
        await follower.until(lambda held: "Kubernetes//Pod/shop/other" in held)
        await mesh.kube.delete(f"{PODS}/other", grace_s=0)
        await follower.until(lambda held: "Kubernetes//Pod/shop/other" not in held)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await certificate(channel, bearer(mesh.token), URI)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    on_mesh(cluster, test)


def test_the_root_is_in_every_namespace_and_stays_there(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        roots = await mesh.root()
        assert await mesh.root("shop") == roots and await mesh.root("default") == roots
        await harness.add_namespace(mesh.kube, "later")
        assert await mesh.root("later") == roots
        path = "/api/v1/namespaces/later/configmaps/istio-ca-root-cert"
        await mesh.kube.delete(path)
        assert await mesh.root("later") == roots
        await mesh.kube.patch(path, {"data": {"root-cert.pem": "forged", "other": "stays"}})
        while await mesh.root("later") != roots:
            await asyncio.sleep(0.02)
        assert (await mesh.kube.get(path))["data"]["other"] == "stays"

    on_mesh(cluster, test)


def test_the_servers_name_and_root_are_checked(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        for name in ("sidestep-control.istio-system.svc", "istiod.istio-system.svc.cluster.local", cluster.address):
            follower = Follower(await mesh.channel(name), bearer(mesh.token))
            await follower.ask()
            await follower.take()
        follower = Follower(await mesh.channel("other.istio-system.svc"), bearer(mesh.token))
        assert await ended(follower) is grpc.StatusCode.UNAVAILABLE

    on_mesh(cluster, test)


def violations_of_tls(address: str, port: int) -> list[str]:
    """What a port says to who speaks no TLS, or TLS without a certificate that leads anywhere."""
    found = []
    with socket.create_connection((address, port), timeout=HANG_S) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        answer = plain.recv(100)
        if answer[3:4] == b"\x04":  # the type of an HTTP/2 SETTINGS frame
            found.append(f"port {port} speaks HTTP/2 without TLS")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((address, port), timeout=HANG_S) as raw, context.wrap_socket(raw) as tls:
            tls.getpeercert(True)
    except ssl.SSLError:
        found.append(f"port {port} speaks no TLS")
    return found


def test_certificates_are_to_be_had_over_tls_only(tmp_path: Path) -> None:
    with harness.cluster(tmp_path, "--plaintext") as cluster:

        async def test(mesh: Mesh) -> None:
            await add_web(mesh)
            assert await asyncio.to_thread(violations_of_tls, cluster.address, 15012) == []
            control_run = await asyncio.to_thread(violations_of_tls, "127.0.0.1", 15010)
            assert "port 15010 speaks HTTP/2 without TLS" in control_run
            async with grpc.aio.insecure_channel("127.0.0.1:15010") as channel:
                follower = Follower(channel, ())
                await follower.ask()
                await follower.take()
                await follower.until(lambda held: POD in held)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await certificate(channel, bearer(mesh.token), URI)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(OSError):
                socket.create_connection((cluster.address, 15010), timeout=HANG_S)

        on_mesh(cluster, test)


def test_15010_is_off_by_default(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        for address in ("127.0.0.1", mesh.cluster.address):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, 15010), timeout=HANG_S)

    on_mesh(cluster, test)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kubeconfig", "/nonexistent"], "kubeconfig /nonexistent: No such file"),
        (["--bind", "somewhere"], "--bind 'somewhere' is no address"),
        (["--trust-domain", "Ha!"], "--trust-domain"),
        (["--max-ttl-s", "0"], "--max-ttl-s"),
        (["--trusted-account", "x"], "not NAMESPACE/SERVICEACCOUNT"),
        (["--kubeconfig", "GOOD", "--cacerts", "/nonexistent"], "ca-cert.pem is missing"),
        (["--kubeconfig", "FORGED"], "Unauthorized"),
    ],
)
def test_what_it_cannot_start_with(cluster: Cluster, tmp_path: Path, arguments: list[str], says: str) -> None:
    forged = tmp_path / "forged"
    forged.write_text("\n".join(_forged(line) for line in cluster.kubeconfig.read_text().splitlines()))
    words = {"GOOD": str(cluster.kubeconfig), "FORGED": str(forged)}
    command = [sys.executable, "-m", "sidestep", "control", "--bind", cluster.address]
    done = subprocess.run(
        [*command, *(words.get(each, each) for each in arguments)], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 1
    [line] = [each for each in done.stderr.splitlines() if each.startswith("sidestep control: ")]
    assert says in line and "Traceback" not in done.stderr


def _forged(line: str) -> str:
    return f"{line}x" if line.strip().startswith("token:") else line


def test_a_port_that_is_taken(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        where = ["--kubeconfig", str(cluster.kubeconfig), "--bind", cluster.address]
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "sidestep", "control", *where],
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == 1 and "does another control plane run here?" in done.stderr
        assert "Traceback" not in done.stderr

    on_mesh(cluster, test)


def test_it_ends_when_asked_with_streams_open(cluster: Cluster) -> None:
    async def test(mesh: Mesh) -> None:
        follower = await mesh.follow()
        assert mesh.cluster.control is not None
        assert await asyncio.to_thread(mesh.cluster.control.stop) == 0
        assert await ended(follower) is not grpc.StatusCode.OK

    on_mesh(cluster, test)


def test_the_bind_address_may_be_of_either_family() -> None:
    from sidestep.control.wiring import _listener

    for address in ("127.0.0.1", "::1", "::", "0.0.0.0"):
        with _listener(address, 0) as made:
            port = made.getsockname()[1]
            with socket.create_connection(("127.0.0.1" if "." in address or address == "::" else "::1", port)):
                pass
