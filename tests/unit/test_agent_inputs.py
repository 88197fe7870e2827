"""What the agent reads from outside: certificates, --state-file, its command line, the Host of a request."""

import argparse
import asyncio
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidestep.node import ca, command, dump, statefile
from sidestep.node.admin import only_local
from sidestep.node.agent import CertificateError
from sidestep.node.httpd import Request, Response
from sidestep.wire.pb import workload_pb2

URI = "spiffe://cluster.local/ns/shop/sa/web"
OTHER = "spiffe://cluster.local/ns/shop/sa/api"


class Ca:
    """An authority that answers as it is told to."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "root")])
        self.root = self._pem(self.sign(self.key.public_key(), self.name, x509.BasicConstraints(True, None)))

    def sign(self, key: Any, subject: x509.Name, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(self.name, subject, key, x509.random_serial_number(), now, now + timedelta(1))
        return builder.add_extension(extension, critical=True).sign(self.key, hashes.SHA256())

    def leaf(self, request: str, *uris: str) -> str:
        key = x509.load_pem_x509_csr(request.encode()).public_key()
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        return self._pem(self.sign(key, x509.Name([]), names))

    @staticmethod
    def _pem(certificate: x509.Certificate) -> str:
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


def test_a_request_says_who_asks_and_nothing_else() -> None:
    request = x509.load_pem_x509_csr(ca.signing_request(ec.generate_private_key(ec.SECP256R1()), URI).encode())
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical and names.value.get_values_for_type(x509.UniformResourceIdentifier) == [URI]
    assert request.is_signature_valid and not list(request.subject)


def test_a_certificate_that_has_ended_is_refused() -> None:
    authority, key = Ca(), ec.generate_private_key(ec.SECP256R1())
    taken = ca.accept(URI, key, [authority.leaf(ca.signing_request(key, URI), URI), authority.root])
    assert ca.current(taken, taken.not_after_s - 1) is taken
    with pytest.raises(CertificateError, match="ended 5 s ago"):
        ca.current(taken, taken.not_after_s + 5)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_channel_that_is_replaced_ends_the_request_and_not_the_task(when: str) -> None:
    """The agent's task asks again later; only its own cancellation ends it."""

    async def run() -> None:
        server = grpc.aio.server()
        heard = asyncio.Event()

        async def never(request: bytes, context: Any) -> bytes:
            heard.set()
            await asyncio.Event().wait()
            return b""

        service, _, method = ca.METHOD[1:].partition("/")
        handler = grpc.unary_unary_rpc_method_handler(never)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

        async def same(_: bool) -> grpc.aio.Channel:
            return channel

        authority = ca.Authority(same, None, "Kubernetes")
        try:
            async with asyncio.timeout(20):
                if when == "before":
                    await channel.close(None)
                    with pytest.raises(CertificateError, match="was replaced"):
                        await authority.issue(URI)
                    return

                async def ask() -> None:
                    with pytest.raises(CertificateError, match="was replaced"):
                        await authority.issue(URI)

                async with asyncio.TaskGroup() as group:
                    group.create_task(ask())
                    await heard.wait()
                    await channel.close(None)
        finally:
            await server.stop(None)

    asyncio.run(run())


def test_a_request_that_is_cancelled_is_cancelled() -> None:
    async def run() -> None:
        waiting: asyncio.Future[grpc.aio.Channel] = asyncio.get_running_loop().create_future()

        async def never(_: bool) -> grpc.aio.Channel:
            return await waiting

        async with asyncio.TaskGroup() as group:
            asked = group.create_task(ca.Authority(never, None, "Kubernetes").issue(URI))
            await asyncio.sleep(0)
            asked.cancel()
        assert asked.cancelled()

    asyncio.run(run())


def test_a_good_answer_is_taken() -> None:
    authority, key = Ca(), ec.generate_private_key(ec.SECP256R1())
    leaf = authority.leaf(ca.signing_request(key, URI), URI)
    taken = ca.accept(URI, key, [leaf, authority.root.rstrip("\n")])
    assert taken.chain_pem == leaf and taken.roots_pem == authority.root
    assert taken.serial == str(x509.load_pem_x509_certificate(leaf.encode()).serial_number)
    loaded = serialization.load_pem_private_key(taken.key_pem.encode(), None)
    assert loaded.public_key() == key.public_key()


def bad_answers() -> dict[str, Any]:
    authority, stranger, key = Ca(), Ca(), ec.generate_private_key(ec.SECP256R1())
    request = ca.signing_request(key, URI)
    foreign = ca.signing_request(ec.generate_private_key(ec.SECP256R1()), URI)
    good = authority.leaf(request, URI)
    return {
        "empty": (key, []),
        "no root": (key, [good]),
        "another identity": (key, [authority.leaf(request, OTHER), authority.root]),
        "two identities": (key, [authority.leaf(request, URI, OTHER), authority.root]),
        "another key": (key, [authority.leaf(foreign, URI), authority.root]),
        "signed by a stranger": (key, [stranger.leaf(request, URI), authority.root]),
        "a root that is not its issuer": (key, [good, stranger.root]),
        "an intermediate that is not": (key, [good, good, authority.root]),
        "no PEM": (key, ["-----BEGIN NONSENSE-----", authority.root]),
        "no name": (key, [authority.root, authority.root]),
    }


@pytest.mark.parametrize("name", sorted(bad_answers()))
def test_a_bad_answer_is_refused(name: str) -> None:
    key, chain = bad_answers()[name]
    with pytest.raises(CertificateError):
        ca.accept(URI, key, chain)


def test_state_file_becomes_records(tmp_path: Path) -> None:
    path = tmp_path / "state.yaml"
    path.write_text(
        """
workloads:
- {uid: K//Pod/shop/web, name: web, namespace: shop, workloadIps: [10.0.0.1, "fd00::1"], protocol: HBONE,
   services: {shop/web.shop.svc: {"80": 8080}}, status: Unhealthy, capacity: 3}
services:
- {name: web, namespace: shop, hostname: web.shop.svc, vips: [/10.9.0.1, "n/fd99::1"], ports: {"80": 8080}}
certificates:
- {identity: spiffe://cluster.local/ns/shop/sa/web, key: a.key, chain: a.pem, roots: r.pem}
"""
    )
    state = statefile.load(path)
    workload, service = (workload_pb2.Address.FromString(body) for _, _, body in state.records)
    assert [name for name, _, _ in state.records] == ["K//Pod/shop/web", "shop/web.shop.svc"]
    assert workload.workload.addresses == [bytes([10, 0, 0, 1]), bytes.fromhex("fd" + "00" * 14 + "01")]
    assert (
        workload.workload.tunnel_protocol == 1
        and workload.workload.status == 1
        and workload.workload.capacity.value == 3
    )
    assert workload.workload.services["shop/web.shop.svc"].ports[0].target_port == 8080
    assert [(a.network, len(a.address)) for a in service.service.addresses] == [("", 4), ("n", 16)]
    assert state.certificates[URI] == (tmp_path / "a.key", tmp_path / "a.pem", tmp_path / "r.pem")


@pytest.mark.parametrize(
    "text",
    [
        "workloads: [",
        "[]",
        "worklods: []",
        "workloads: [{name: a, workloadIps: [10.0.0.1]}]",
        "workloads: [{uid: a}]",
        "workloads: [{uid: a, workloadIps: [nonsense]}]",
        "workloads: [{uid: a, workloadIps: [10.0.0.1], protocol: SMOKE}]",
        "workloads: [{uid: a, workloadIps: [10.0.0.1], colour: red}]",
        "workloads: [{uid: 7, workloadIps: [10.0.0.1]}]",
        "services: [{name: a}]",
        "certificates: [{identity: a}]",
    ],
)
def test_a_state_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.yaml"
    path.write_text(text)
    with pytest.raises(command.StateError):
        statefile.load(path)


def arguments(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    base = [
        "agent",
        "--node",
        "n",
        "--node-ip",
        "10.0.0.1",
        "--engine-socket",
        "/e",
        "--run-dir",
        "/r",
        "--bpf-dir",
        "/b",
    ]
    return parser.parse_args([*base, *more])


def test_the_command_line() -> None:
    config = command.config_of(
        arguments("--control", "[fd00::1]:15012", "--cluster-cidr", "10.0.0.0/8", "--cluster-cidr", "fd00::/8")
    )
    assert config.control_name == "fd00::1" and config.cluster_cidrs == ("10.0.0.0/8", "fd00::/8")
    assert config.excluded == {"kube-system"} and config.drain_quiet_s == 10


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--control", "nowhere"],
        ["--control", "a:1", "--state-file", "/s"],
        ["--control", "a:1", "--node-ip", "nonsense"],
        ["--control", "a:1", "--cluster-cidr", "10.0.0.0/99"],
        ["--control", "a:1", "--drain-quiet-s", "-1"],
    ],
)
def test_a_command_line_that_cannot_be_meant(more: list[str]) -> None:
    with pytest.raises(command.StartError):
        command.config_of(arguments(*more))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", HTTPStatus.OK),
        ("LOCALHOST:15000", HTTPStatus.OK),
        ("127.0.0.1:15000", HTTPStatus.OK),
        ("127.8.8.8", HTTPStatus.OK),
        ("[::1]:15000", HTTPStatus.OK),
        ("evil.example", HTTPStatus.FORBIDDEN),
        ("localhost.evil.example", HTTPStatus.FORBIDDEN),
        ("10.0.0.1:15000", HTTPStatus.FORBIDDEN),
        ("localhost:15000:x", HTTPStatus.FORBIDDEN),
        ("", HTTPStatus.FORBIDDEN),
    ],
)
def test_only_this_machine_is_asked_for(host: str, status: HTTPStatus) -> None:
    async def page(request: Request) -> Response:
        return Response(b"x")

    headers = {"host": host} if host else {}

    async def ask() -> Response:
        return await only_local(page)(Request("GET", "/", headers))

    assert asyncio.run(ask()).status == status


def test_dumps_are_shown_in_ztunnels_words() -> None:
    record = {"uid": "K//Pod/a/b", "name": "b", "namespace": "a", "addresses": ["10.0.0.1"], "protocol": "PLAIN"}
    shown = dump.workload(record | {"service_account": "till", "healthy": False, "zone": "z", "node": ""})
    assert shown["workloadIps"] == ["10.0.0.1"] and shown["protocol"] == "TCP" and shown["status"] == "Unhealthy"
    assert shown["serviceAccount"] == "till" and shown["locality"] == {"zone": "z"} and "node" not in shown
    service = {"name": "s", "namespace": "a", "hostname": "s.a", "addresses": ["10.9.0.1"], "endpoints": ["u"]}
    assert dump.shaped("services", [service])[0]["vips"] == ["/10.9.0.1"]
    assert dump.shaped("services", [service])[0]["endpoints"] == {"u": {"workloadUid": "u"}}
    assert [each["uid"] for each in dump.shaped("workloads", [record, record | {"uid": "A"}])] == ["A", "K//Pod/a/b"]
    assert dump.shaped("tunnels", [{"x": 1}]) == [{"x": 1}]
