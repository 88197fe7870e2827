"""The authority: what a certificate says, where the root is kept, and one test for each reason to refuse."""

import asyncio
import base64
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from sidestep.control import authority, objects, roots
from sidestep.control.authority import Authority, AuthorityError, RequestError
from sidestep.control.callers import Gate
from sidestep.control.certificates import Certificates
from sidestep.control.metrics import Metrics
from sidestep.control.records import Mesh
from sidestep.control.translate import Cluster
from sidestep.kube.client import KubeClient, KubeError
from sidestep.model import Identity
from tests.harness.authorities import key_pem, pem, signed_ca, with_intermediate
from tests.harness.control import bearer, certificate, signing_request
from tests.harness.kubernetes import Kubernetes, kubernetes, refusal

NOW = time.time()
HANG_S = 20.0
WEB = Identity("cluster.local", "shop", "web")
URI = str(WEB)


def read(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def chained(chain: list[str]) -> list[x509.Certificate]:
    """The leaf's chain as an independent verifier builds it. Raises where it does not reach a root."""
    store = Store(x509.load_pem_x509_certificates(chain[-1].encode()))
    verifier = PolicyBuilder().store(store).build_client_verifier()
    return list(verifier.verify(read(chain[0]), [read(each) for each in chain[1:-1]]).chain)


def test_what_a_leaf_says() -> None:
    ca = authority.new("cluster.local", NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    chain = ca.leaf(signing_request(key), WEB, 3600, NOW)
    leaf = read(chain[0])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical and list(names.value) == [x509.UniformResourceIdentifier(URI)]
    assert leaf.public_key() == key.public_key() and not list(leaf.subject)
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    signs = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert signs.digital_signature and not signs.key_cert_sign
    now = datetime.fromtimestamp(int(NOW), UTC)
    assert leaf.not_valid_after_utc == now + timedelta(hours=1)
    assert leaf.not_valid_before_utc == now - timedelta(seconds=60)
    assert len(chained(chain)) == 2


def test_serials_differ() -> None:
    ca = authority.new("cluster.local", NOW)
    serials = {read(ca.leaf(signing_request(), WEB, 3600, NOW)[0]).serial_number for _ in range(20)}
    assert len(serials) == 20 and min(serials).bit_length() > 64


def test_short_lives_begin_late_enough_to_have_a_half() -> None:
    ca = authority.new("cluster.local", NOW)
    leaf = read(ca.leaf(signing_request(), WEB, 10, NOW)[0])
    assert datetime.fromtimestamp(int(NOW), UTC) - leaf.not_valid_before_utc == timedelta(seconds=1)


def test_a_chain_comes_leaf_first_root_last_and_none_outlives_the_authority() -> None:
    ca = with_intermediate()
    chain = ca.leaf(signing_request(), WEB, 86400 * 30, NOW)
    assert [read(each).issuer for each in chain[:-1]] == [read(each).subject for each in chain[1:]]
    assert len(chain) == 4 and len(chained(chain)) == 4
    assert read(chain[0]).not_valid_after_utc == ca.certificate.not_valid_after_utc


def test_a_bundle_of_roots_is_passed_on_whole() -> None:
    old, new = authority.new("cluster.local", NOW), authority.new("cluster.local", NOW)
    files = new.files() | {"root-cert.pem": new.roots_pem + old.roots_pem}
    chain = authority.load(files, NOW).leaf(signing_request(), WEB, 3600, NOW)
    assert x509.load_pem_x509_certificates(chain[-1].encode()) == [new.certificate, old.certificate]
    assert len(chained(chain)) == 2


def test_no_leaf_outlives_what_vouches_for_it() -> None:
    """The CA of a chain may be good for longer than what is above it."""
    root = authority.new("corp", NOW)
    middle, middle_key = signed_ca("middle", root.certificate, root.key, end=NOW + 600)
    ca, ca_key = signed_ca("ca", middle, middle_key)
    files = {
        "ca-cert.pem": pem(ca),
        "ca-key.pem": key_pem(ca_key),
        "cert-chain.pem": pem(ca) + pem(middle),
        "root-cert.pem": authority.new("other", NOW).roots_pem + root.roots_pem,
    }
    made = authority.load(files, NOW)
    assert made.under() == root.certificate  # not the first of the bundle
    chain = made.leaf(signing_request(), WEB, 3600, NOW)
    assert read(chain[0]).not_valid_after_utc == middle.not_valid_after_utc
    with pytest.raises(RequestError, match="has ended"):
        made.leaf(signing_request(), WEB, 3600, NOW + 601)


def test_overlapping_roots() -> None:
    """A root is replaced in three steps; neighbours in time trust each other at every one of them."""
    old, new = authority.new("a", NOW), with_intermediate()
    both = old.roots_pem + new.roots_pem
    steps = [
        old,
        authority.load(old.files() | {"root-cert.pem": both}, NOW),
        authority.load(new.files() | {"root-cert.pem": both}, NOW),
        authority.load(new.files(), NOW),
    ]
    chains = [step.leaf(signing_request(), WEB, 3600, NOW) for step in steps]
    assert [len(x509.load_pem_x509_certificates(chain[-1].encode())) for chain in chains] == [1, 2, 2, 1]
    for before, after in itertools.pairwise(chains):
        chained([*before[:-1], after[-1]])
        chained([*after[:-1], before[-1]])
    with pytest.raises(VerificationError):
        chained([*chains[3][:-1], chains[0][-1]])


def test_files_and_back() -> None:
    for ca in (authority.new("cluster.local", NOW), with_intermediate()):
        again = authority.load(ca.files(), NOW)
        assert again.files() == ca.files()
        assert chained(again.leaf(signing_request(), WEB, 3600, NOW))[-1] == read(ca.roots_pem)


def bad_files() -> dict[str, tuple[dict[str, str | None], str]]:
    good, other = authority.new("a", NOW), authority.new("b", NOW)
    ended, ended_key = signed_ca("ended", good.certificate, good.key, NOW - 100, NOW - 1)
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = good.leaf(signing_request(leaf_key), WEB, 3600, NOW)[0]
    strange = key_pem(ed25519.Ed25519PrivateKey.generate())
    cases: dict[str, tuple[dict[str, str | None], str]] = {
        "": (dict(good.files()), ""),
        "no key": ({"ca-key.pem": None}, "ca-key.pem is missing"),
        "no root": ({"root-cert.pem": ""}, "root-cert.pem is missing"),
        "not PEM": ({"ca-cert.pem": "hello"}, "cannot be read"),
        "another key": ({"ca-key.pem": key_pem(other.key)}, "not the key"),
        "strange key": ({"ca-key.pem": strange}, "neither"),
        "not an authority": ({"ca-cert.pem": leaf, "ca-key.pem": key_pem(leaf_key)}, "not the certificate of an"),
        "ended": ({"ca-cert.pem": pem(ended), "ca-key.pem": key_pem(ended_key)}, "valid until"),
        "another root": ({"root-cert.pem": other.roots_pem}, "do not lead to"),
    }
    return cases


@pytest.mark.parametrize("case", [case for case in bad_files() if case])
def test_files_that_are_refused(case: str, tmp_path: Path) -> None:
    cases = bad_files()
    changes, message = cases[case]
    files = {name: text for name, text in {**cases[""][0], **changes}.items() if text is not None}
    with pytest.raises(AuthorityError, match=message):
        authority.load(files, NOW)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(AuthorityError, match=f"{tmp_path}.*{message}"):
        roots.from_directory(tmp_path)


def requests() -> dict[str, str]:
    good = signing_request()
    der = bytearray(base64.b64decode("".join(good.splitlines()[1:-1])))
    der[-1] ^= 1  # the last byte of the signature
    broken = base64.encodebytes(bytes(der)).decode()
    begin, end = good.splitlines()[0], good.splitlines()[-1]

    def of(key: Any, algorithm: Any) -> str:
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
        return request.public_bytes(serialization.Encoding.PEM).decode()

    return {
        "empty": "",
        "not PEM": "hello",
        "a certificate": authority.new("x", NOW).roots_pem,
        "signed by another key": f"{begin}\n{broken}{end}\n",
        "too large": good + "\n" * authority.CSR_MAX,
        "RSA 1024": of(rsa.generate_private_key(65537, 1024), hashes.SHA256()),
        "P-224": of(ec.generate_private_key(ec.SECP224R1()), hashes.SHA256()),
        "Ed25519": of(ed25519.Ed25519PrivateKey.generate(), None),
    }


@pytest.mark.filterwarnings("ignore")  # of cryptography, about the bad keys made here
@pytest.mark.parametrize("case", ["empty", "not PEM", "a certificate", "signed by another key", "too large",
                                  "RSA 1024", "P-224", "Ed25519"])  # fmt: skip
def test_requests_that_are_refused(case: str) -> None:
    with pytest.raises(RequestError):
        authority.public_key(requests()[case])


def test_keys_that_are_taken() -> None:
    for key in (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
    ):
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        text = request.public_bytes(serialization.Encoding.PEM).decode()
        assert len(chained(authority.new("x", NOW).leaf(text, WEB, 3600, NOW))) == 2


def test_the_server_is_who_clients_look_for(tmp_path: Path) -> None:
    ca = authority.new("cluster.local", NOW)
    key, chain = ca.server(["istiod.istio-system.svc"], ["192.0.2.1"], 3600, NOW)
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "chain").write_bytes(chain)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(tmp_path / "chain", tmp_path / "key")

    def handshake(name: str, trusted: str) -> None:
        client = ssl.create_default_context(cadata=trusted)
        bios = [ssl.MemoryBIO() for _ in range(4)]
        ends = (
            client.wrap_bio(bios[0], bios[1], server_hostname=name),
            served.wrap_bio(bios[1], bios[0], server_side=True),
        )
        for _ in range(8):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    for name in ("istiod.istio-system.svc", "192.0.2.1"):
        handshake(name, ca.roots_pem)
    for name, trusted in (("other.svc", ca.roots_pem), ("192.0.2.1", authority.new("x", NOW).roots_pem)):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(name, trusted)


# Where the root is kept.


class Secrets:
    """A Secret as the API keeps it."""

    def __init__(self) -> None:
        self.secret: dict[str, Any] | None = None
        self.writes: list[str] = []
        self.first: dict[str, Any] | None = None  # somebody else's, who is faster than our create

    def __call__(self, method: str, path: str, body: Any) -> tuple[int, Any] | None:
        if method == "GET":
            return (200, self.secret) if self.secret is not None else None
        self.writes.append(method)
        if self.first is not None:
            self.secret, self.first = self.first, None
        if self.secret is not None:
            return 409, refusal("AlreadyExists", "there is one")
        self.secret = body
        return 201, body


def with_api(test: Callable[[Kubernetes, KubeClient], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(HANG_S), kubernetes() as api, api.client() as client:
            await test(api, client)

    asyncio.run(whole())


def secret_of(ca: Authority) -> dict[str, Any]:
    return {"data": {name: base64.b64encode(text.encode()).decode() for name, text in ca.files().items()}}


def test_the_root_is_made_once_and_found_again() -> None:
    async def test(api: Kubernetes, client: KubeClient) -> None:
        api.answers = secrets = Secrets()
        first = await roots.kept(client, "istio-system", "cluster.local")
        assert secrets.writes == ["POST"]
        again = await roots.kept(client, "istio-system", "cluster.local")
        assert secrets.writes == ["POST"] and again.files() == first.files()
        assert secrets.secret is not None and secrets.secret["metadata"]["name"] == "sidestep-ca"

    with_api(test)


def test_who_comes_second_takes_the_root_of_the_first() -> None:
    async def test(api: Kubernetes, client: KubeClient) -> None:
        api.answers = secrets = Secrets()
        other = authority.new("cluster.local", NOW)
        secrets.first = secret_of(other)
        assert (await roots.kept(client, "istio-system", "cluster.local")).files() == other.files()

    with_api(test)


def test_a_secret_that_cannot_be_used_is_not_touched() -> None:
    async def test(api: Kubernetes, client: KubeClient) -> None:
        api.answers = secrets = Secrets()
        for data in ({}, {"ca-cert.pem": "%"}, {"ca-cert.pem": "aGVsbG8="}):
            secrets.secret = {"data": data}
            with pytest.raises(AuthorityError, match="left as it is"):
                await roots.kept(client, "istio-system", "cluster.local")
        assert secrets.writes == []

    with_api(test)


def test_an_api_that_refuses_the_secret_is_not_answered_with_a_root_of_our_own() -> None:
    async def test(api: Kubernetes, client: KubeClient) -> None:
        api.answers = lambda method, path, body: (403, refusal("Forbidden", "no"))
        with pytest.raises(KubeError):
            await roots.kept(client, "istio-system", "cluster.local")

    with_api(test)


# CreateCertificate: each test spoils one thing of a request that is granted.

NODE = "n1"


@dataclass
class Case:
    """A cluster and a request. As it stands the request is granted."""

    review: dict[str, Any]
    pods: dict[str, dict[str, Any]]
    uri: str = URI
    csr: str | None = None
    headers: tuple[tuple[str, str], ...] = bearer("a.good.token")
    trust_domain: str = "cluster.local"
    seconds: int = 3600
    more: dict[str, str] = field(default_factory=dict)
    known: bool = True  # the pods are known without asking the API


def pod(namespace: str, name: str, account: str, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": namespace, "name": name, "uid": f"uid-{name}"},
        "spec": {"nodeName": NODE, "serviceAccountName": account, **spec},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }


def good() -> Case:
    extra = {
        "authentication.kubernetes.io/pod-name": ["ztunnel-x"],
        "authentication.kubernetes.io/pod-uid": ["uid-ztunnel-x"],
    }
    user = {"username": "system:serviceaccount:istio-system:ztunnel", "extra": extra}
    agent = pod("istio-system", "ztunnel-x", "ztunnel", hostNetwork=True)
    return Case(
        review={"authenticated": True, "audiences": ["istio-ca"], "user": user},
        pods={"agent": agent, "web": pod("shop", "web-1", "web")},
    )


@asynccontextmanager
async def served(case: Case, ca: Authority) -> AsyncIterator[grpc.aio.Channel]:
    """The service with a Kubernetes API as the case says."""

    def answers(method: str, path: str, body: Any) -> tuple[int, Any] | None:
        if path.endswith("/tokenreviews"):
            assert body["spec"] == {"token": "a.good.token", "audiences": ["istio-ca"]}
            return 201, {"status": case.review}
        path, _, query = path.partition("?")
        for each in case.pods.values():
            meta = each["metadata"]
            if path == f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}":
                return 200, each
        if path.endswith("/pods"):
            namespace = path.split("/")[-2]
            assert query == f"fieldSelector=spec.nodeName%3D{NODE}"
            found = [each for each in case.pods.values() if each["metadata"]["namespace"] == namespace]
            return 200, {"items": found, "metadata": {}}  # whatever the selector says: we look ourselves
        return None

    async with kubernetes() as api, api.client() as client:
        api.answers = answers
        mesh = Mesh(Cluster(), "istio-system")
        for each in case.pods.values() if case.known else ():
            mesh.pod(f"{each['metadata']['namespace']}/{each['metadata']['name']}", objects.pod_of(each))
        gate = Gate(client, mesh, ["istio-system/ztunnel", "istio-system/sidestep-agent"])
        service = Certificates(gate, roots.Current(ca), case.trust_domain, 86400, Metrics())
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((service.handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            await server.stop(None)


async def _ask(case: Case, ca: Authority) -> list[str]:
    async with asyncio.timeout(HANG_S), served(case, ca) as channel:
        more = {"csr": case.csr, "seconds": case.seconds}
        return await certificate(channel, case.headers, case.uri, **more, **case.more)  # type: ignore[arg-type]


def ask(case: Case, ca: Authority | None = None) -> list[str]:
    """The answer. Raises AioRpcError."""
    return asyncio.run(_ask(case, ca or authority.new("cluster.local", NOW)))


def refused(case: Case, capfd: pytest.CaptureFixture[str], code: str, reason: str) -> None:
    """Refused with that code, a reason in the log, and nothing of it for the caller."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        ask(case)
    assert caught.value.code().name == code
    assert caught.value.details() in (
        "request authenticate failure",
        "request refused",
        "cannot be decided now, try again",
    )
    log = capfd.readouterr().err
    assert f"code={code}" in log and reason in log, log
    assert "a.good.token" not in log


@pytest.mark.parametrize("known", [True, False])
def test_granted(known: bool) -> None:
    case = good()
    case.known = known
    chain = ask(case)
    leaf = chained(chain)[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(URI)]


@pytest.mark.parametrize(("seconds", "lives"), [(3600, 3600), (0, 86400), (-5, 86400), (10**9, 86400), (2**62, 86400)])
def test_the_lifetime_is_at_most_ours(seconds: int, lives: int) -> None:
    leaf = read(ask(replace(good(), seconds=seconds))[0])
    asked = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    assert asked == timedelta(seconds=lives + 60)


def test_another_node_in_the_request_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    case = good()
    case.pods["web"]["spec"]["nodeName"] = "n2"
    case.more = {"NODE_NAME": "n2"}
    refused(case, capfd, "PERMISSION_DENIED", "no pod of shop/web is on n1")


def test_no_token(capfd: pytest.CaptureFixture[str]) -> None:
    refused(replace(good(), headers=()), capfd, "UNAUTHENTICATED", "no token")
    for value in ("a.good.token", "Basic a.good.token", "Bearer ", "Bearer"):
        refused(replace(good(), headers=(("authorization", value),)), capfd, "UNAUTHENTICATED", "no token")


def test_two_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    refused(replace(good(), headers=bearer("a.good.token") * 2), capfd, "UNAUTHENTICATED", "no token")


def test_token_that_the_api_does_not_know(capfd: pytest.CaptureFixture[str]) -> None:
    for spoiled in ({"authenticated": False, "error": "expired"}, {}, {"authenticated": "true"}):
        case = good()
        del case.review["authenticated"]
        case.review |= spoiled
        refused(case, capfd, "UNAUTHENTICATED", "the token is not good")


def test_token_for_another_audience(capfd: pytest.CaptureFixture[str]) -> None:
    for audiences in (["kubernetes.default.svc"], [], None):
        case = good()
        case.review["audiences"] = audiences
        refused(case, capfd, "UNAUTHENTICATED", "not for istio-ca")


def test_who_is_no_service_account(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("admin", "system:node:n1", "system:serviceaccount:", "system:serviceaccount:istio-system", ""):
        case = good()
        case.review["user"]["username"] = name
        refused(case, capfd, "UNAUTHENTICATED", "is no service account")


def test_account_that_is_not_trusted(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("shop:web", "istio-system:default", "shop:ztunnel"):
        case = good()
        case.review["user"]["username"] = f"system:serviceaccount:{name}"
        refused(case, capfd, "PERMISSION_DENIED", "is not trusted with nodes")


def test_token_that_is_bound_to_no_pod(capfd: pytest.CaptureFixture[str]) -> None:
    for key in ("pod-name", "pod-uid"):
        for value in (None, [], [""], ["a", "b"]):
            case = good()
            case.review["user"]["extra"][f"authentication.kubernetes.io/{key}"] = value
            refused(case, capfd, "PERMISSION_DENIED", "is not bound to a pod")


def test_bound_pod_that_does_not_exist(capfd: pytest.CaptureFixture[str]) -> None:
    case = good()
    del case.pods["agent"]
    refused(case, capfd, "PERMISSION_DENIED", "does not exist")


@pytest.mark.parametrize("known", [True, False])
def test_bound_pod_that_is_another_now(known: bool, capfd: pytest.CaptureFixture[str]) -> None:
    case = replace(good(), known=known)
    case.pods["agent"]["metadata"]["uid"] = "uid-newer"
    refused(case, capfd, "PERMISSION_DENIED", "does not exist")


@pytest.mark.parametrize("known", [True, False])
def test_bound_pod_of_another_account(known: bool, capfd: pytest.CaptureFixture[str]) -> None:
    case = replace(good(), known=known)
    case.pods["agent"]["spec"]["serviceAccountName"] = "default"
    refused(case, capfd, "PERMISSION_DENIED", "is of account default")


@pytest.mark.parametrize("spoil", ["ended", "nowhere"])
def test_bound_pod_that_does_not_run(spoil: str, capfd: pytest.CaptureFixture[str]) -> None:
    case = good()
    if spoil == "ended":
        case.pods["agent"]["status"]["phase"] = "Succeeded"
    else:
        del case.pods["agent"]["spec"]["nodeName"]
    refused(case, capfd, "PERMISSION_DENIED", "does not run on a node")


def test_identity_that_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    for uri in ("", "web", "spiffe://cluster.local/ns/shop", "spiffe://cluster.local/ns/shop/sa/web/x"):
        refused(replace(good(), uri=uri), capfd, "PERMISSION_DENIED", "spiffe://")


def test_identity_of_another_trust_domain(capfd: pytest.CaptureFixture[str]) -> None:
    case = replace(good(), uri="spiffe://other.local/ns/shop/sa/web")
    refused(case, capfd, "PERMISSION_DENIED", "other.local is not cluster.local")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("uri", ["shop/sa/other", "istio-system/sa/web", "other/sa/web"])
def test_identity_that_no_pod_of_the_node_has(uri: str, known: bool, capfd: pytest.CaptureFixture[str]) -> None:
    case = replace(good(), uri=f"spiffe://cluster.local/ns/{uri}", known=known)
    refused(case, capfd, "PERMISSION_DENIED", "is on n1")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("spoil", ["another node", "no node", "succeeded", "failed", "host network", "gone"])
def test_pod_that_does_not_count(spoil: str, known: bool, capfd: pytest.CaptureFixture[str]) -> None:
    case = replace(good(), known=known)
    web = case.pods["web"]
    if spoil == "another node":
        web["spec"]["nodeName"] = "n2"
    elif spoil == "no node":
        del web["spec"]["nodeName"]
    elif spoil == "host network":
        web["spec"]["hostNetwork"] = True
    elif spoil == "gone":
        del case.pods["web"]
    else:
        web["status"]["phase"] = spoil.capitalize()
    refused(case, capfd, "PERMISSION_DENIED", "no pod of shop/web is on n1")


def test_pending_pods_count() -> None:
    case = good()
    case.pods["web"]["status"] = {"phase": "Pending"}
    assert len(ask(case)) == 2


def test_request_that_does_not_prove_its_key(capfd: pytest.CaptureFixture[str]) -> None:
    case = replace(good(), csr=requests()["signed by another key"])
    refused(case, capfd, "PERMISSION_DENIED", "not by its own key")


def test_request_that_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    refused(replace(good(), csr="hello"), capfd, "PERMISSION_DENIED", "cannot be read")


def test_api_that_cannot_be_asked(capfd: pytest.CaptureFixture[str]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(HANG_S), kubernetes() as api, api.client() as client:
            api.answers = lambda method, path, body: (503, "away")
            gate = Gate(client, Mesh(Cluster(), "istio-system"), ["istio-system/ztunnel"])
            service = Certificates(gate, roots.Current(authority.new("x", NOW)), "cluster.local", 86400, Metrics())
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((service.handlers(),))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await certificate(channel, bearer("a.good.token"), URI)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await server.stop(None)

    asyncio.run(whole())
