"""The engine's decision: a table of cases, and a million random ones against a plain evaluator."""

import ipaddress
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sidestep.wire import channel
from tests.harness.engine import Client, EngineProcess
from tests.tunnel import policy_cases as cases
from tests.tunnel import policy_model as model
from tests.tunnel.policy_model import Connection, Policy, Workload

TEXTS = {
    "open": "no policy selects the workload",
    "not denied": "no policy denies, and there are no allow policies",
    "allowed": "allowed by: {}",
    "denied": "explicitly denied by: {}",
    "not allowed": "allow policies exist, but none allowed",
    "not received": "policy not received yet: {}",
}


def test_there_are_enough_cases_and_each_has_a_source() -> None:
    names = Counter(case.name for case in cases.CASES)
    assert names.most_common(1)[0][1] == 1
    assert len(names) >= 150
    assert sum(case.source.startswith("ztunnel src/") for case in cases.CASES) >= 120


def test_the_model_agrees_with_every_case() -> None:
    """What the engine is compared with below says what the sources say."""
    for case in cases.CASES:
        assert model.decide(case.policies, case.workload, case.connection) == case.verdict, case.name


def test_the_decision_function_agrees_with_every_case() -> None:
    worlds = [
        model.world(
            [model.destination(case.workload, *cases.ADDRESSES), *model.records(case.policies)],
            [model.question(case.connection)],
        )
        for case in cases.CASES
    ]
    lines = model.ask(b"".join(worlds))
    wrong = [
        (case.name, said, model.line(case.verdict))
        for case, said in zip(cases.CASES, lines, strict=True)
        if said != model.line(case.verdict)
    ]
    assert wrong == []


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with EngineProcess(tmp_path_factory.mktemp("policies")) as engine, engine.client() as connected:
        yield connected


def authz(client: Client, connection: Connection) -> dict[str, Any]:
    to = f"[{connection.destination}]" if ":" in connection.destination else connection.destination
    body = {"identity": connection.identity, "source": connection.source, "destination": f"{to}:{connection.port}"}
    return client.call(channel.AUTHZ, body)


def test_authz_agrees_with_every_case(client: Client) -> None:
    told: set[str] = set()
    for case in cases.CASES:
        state = [model.destination(case.workload, *cases.ADDRESSES), *model.records(case.policies)]
        assert client.apply(state, full=True)["rejected"] == []
        said = authz(client, case.connection)
        expected = (case.verdict.allow, case.verdict.policy, case.verdict.rule)
        assert (said["allow"], said["policy"], said["rule"]) == expected, case.name
        assert said["reason"] == TEXTS[case.verdict.reason].format(case.verdict.policy), case.name
        assert said["workload"] == f"Kubernetes//Pod/{case.workload.namespace}/web"
        listed = {each["name"]: each for each in said["policies"]}
        for policy in model.considered(case.policies, case.workload):
            shown = listed.pop(model.key(policy))
            assert (shown["action"], shown["dry_run"]) == (policy["action"], policy["dryRun"])
            assert shown["rule"] == model.rule_of(policy, case.connection), case.name
            assert shown["matched"] == (shown["rule"] >= 0)
            assert reasons(shown) == (None if shown["matched"] else model.missed(policy, case.connection)), case.name
            told |= {name for rule in reasons(shown) or () for name in rule}
        assert listed == {}
    assert told == {*model.NEGATIONS, *model.NEGATIONS.values(), "nothing"}  # each was a reason


def reasons(shown: dict[str, Any]) -> list[list[str]] | None:
    return [sorted(each) for each in shown["missed"]] if "missed" in shown else None


def test_authz_says_why_nothing_matched(client: Client) -> None:
    """Random policies, each rule with the lists that stand in the way, against the plain evaluator."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(300):
        policies = [{**each, "scope": "Global"} for each in some_policies(chance)]
        workload = Workload("shop")
        client.apply([model.destination(workload, *HERE), *model.records(policies)], full=True)
        connection = a_connection(chance)
        listed = {each["name"]: each for each in authz(client, connection)["policies"]}
        for policy in policies:
            expected = None if model.rule_of(policy, connection) >= 0 else model.missed(policy, connection)
            assert reasons(listed[model.key(policy)]) == expected, (policy, connection)


def test_reasons_are_bounded(client: Client) -> None:
    """Of a policy at most 32 rules are explained; where names would find no room, fewer."""
    rules = [cases.only(destinationPorts=[1], sourceIps=["192.0.2.0/24"])] * 40
    names = [cases.policy(f"p{number:03}", *rules, scope="Global") for number in range(256)]
    for policies in (names[:1], names):
        client.apply([model.destination(cases.HERE, *cases.ADDRESSES), *model.records(policies)], full=True)
        shown = authz(client, cases.TLS)["policies"]
        assert len(shown) == len(policies)
        assert reasons(shown[0]) == [["destinationPorts", "sourceIps"]] * 32
    assert reasons(shown[-1]) == []


def test_policies_come_back_as_they_went(client: Client) -> None:
    """DUMP policies, in ztunnel's words: what every case sent."""
    for case in cases.CASES:
        client.apply(model.records(case.policies), full=True)
        dumped = {each.pop("key"): each for each in client.dump("policies")}
        for policy in case.policies:
            shown = dumped.pop(model.key(policy))
            assert shown.pop("version") == "1"
            wanted = {
                **policy,
                "rules": [[[whole(match) for match in clause] for clause in rule] for rule in policy["rules"]],
            }
            assert shown == wanted, case.name
        assert dumped == {}


def whole(match: model.Match) -> dict[str, Any]:
    """The match with its nets as nets."""
    return {
        name: [str(ipaddress.ip_network(each, strict=False)) for each in values] if name.endswith("Ips") else values
        for name, values in match.items()
    }


def test_an_address_without_a_workload(client: Client) -> None:
    client.apply([], full=True)
    said = authz(client, cases.TLS)
    assert (said["allow"], said["reason"], said["workload"]) == (False, "no workload at 10.0.0.2", "")


@pytest.mark.parametrize(
    ("identity", "source", "destination"),
    [
        ("cluster.local/ns/a/sa/b", "10.0.0.1", "10.0.0.2:80"),
        ("spiffe://cluster.local/ns/a", "10.0.0.1", "10.0.0.2:80"),
        ("", "10.0.0", "10.0.0.2:80"),
        ("", "10.0.0.1:0", "10.0.0.2:80"),
        ("", "10.0.0.1:70000", "10.0.0.2:80"),
        ("", "10.0.0.1:1x", "10.0.0.2:80"),
        ("", "[fd00::1", "10.0.0.2:80"),
        ("", "[fd00::1]80", "10.0.0.2:80"),
        ("", "", "10.0.0.2:80"),
        ("", "10.0.0.1", "10.0.0.2"),
        ("", "10.0.0.1", "fd00::2"),
        ("", "10.0.0.1", "web:80"),
    ],
)
def test_questions_that_are_none(client: Client, identity: str, source: str, destination: str) -> None:
    reply, _ = client.request(channel.AUTHZ, {"identity": identity, "source": source, "destination": destination})
    assert not reply["ok"]
    assert reply["error"]


# -- a million decisions -----------------------------------------------------------------------------------------------

WORLDS = 1250
EACH = 800
NAMESPACES = ("a", "b", "ab", "shop")
ACCOUNTS = ("a", "b", "web")
DOMAINS = ("cluster.local", "td")
IPS = ("10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.9", "fd00::1", "fd00::2", "fd00:1::1", "::1:0:1")
HERE = ("10.9.0.1", "fd09::1")
PORTS = (80, 443, 8080, 65535)


def text(chance: random.Random, whole_texts: list[str]) -> dict[str, Any]:
    kind = chance.choice(("Exact", "Exact", "Prefix", "Suffix", "Presence"))
    chosen = chance.choice(whole_texts)
    if kind == "Prefix":
        return {kind: chosen[: chance.randrange(len(chosen) + 1)]}
    if kind == "Suffix":
        return {kind: chosen[chance.randrange(len(chosen) + 1) :]}
    return {kind: [] if kind == "Presence" else chosen}


def value(chance: random.Random, field: str) -> Any:
    if field == "namespaces":
        return text(chance, [*NAMESPACES, ""])
    if field == "principals":
        return text(chance, [f"{d}/ns/{n}/sa/{s}" for d in DOMAINS for n in NAMESPACES for s in ACCOUNTS])
    if field == "serviceAccounts":
        return {"namespace": chance.choice(NAMESPACES), "serviceAccount": chance.choice(ACCOUNTS)}
    if field == "destinationPorts":
        return chance.choice(PORTS)
    address = chance.choice(HERE if field == "destinationIps" and chance.randrange(2) else IPS)
    lengths = (0, 1, 7, 8, 9, 16, 24, 31, 32)
    return f"{address}/{chance.choice((*lengths, 47, 64, 65, 96, 127, 128) if ':' in address else lengths)}"


def match(chance: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        positive = chance.choice(list(model.NEGATIONS))
        name = model.NEGATIONS[positive] if chance.randrange(3) == 0 else positive
        made[name] = [value(chance, positive) for _ in range(chance.choice((1, 1, 2, 4)))]
    return made


def rules(chance: random.Random) -> list[Any]:
    return [
        [[match(chance) for _ in range(chance.choice((0, 1, 1, 2)))] for _ in range(chance.choice((0, 1, 1, 2)))]
        for _ in range(chance.choice((0, 1, 1, 2, 3)))
    ]


def some_policies(chance: random.Random) -> list[Policy]:
    return [
        {
            "name": f"p{number}",
            "namespace": chance.choice(("shop", "shop", "istio-system", "other")),
            "scope": chance.choice(tuple(model.SCOPES)),
            "action": chance.choice(("Allow", "Deny")),
            "rules": rules(chance),
            "dryRun": chance.randrange(5) == 0,
        }
        for number in range(chance.randrange(8))
    ]


def a_connection(chance: random.Random) -> Connection:
    identity = ""
    if chance.randrange(5):
        identity = f"spiffe://{chance.choice(DOMAINS)}/ns/{chance.choice(NAMESPACES)}/sa/{chance.choice(ACCOUNTS)}"
    return Connection(identity, chance.choice(IPS), chance.choice(HERE), chance.choice(PORTS))


def test_a_million_random_decisions() -> None:
    """Distinct connections of a world are decided once by the model; each is asked as often as it was drawn."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    blocks: list[bytes] = []
    expected: list[str] = []
    reasons: Counter[str] = Counter()
    for _ in range(WORLDS):
        policies = some_policies(chance)
        names = [model.key(p) for p in policies if p["scope"] == "WorkloadSelector" and chance.randrange(3)]
        if chance.randrange(10) == 0:
            names.append("shop/never-sent")
        workload = Workload("shop", tuple(names))
        known: dict[Connection, tuple[bytes, str]] = {}
        questions = []
        for _ in range(EACH):
            connection = a_connection(chance)
            if connection not in known:
                verdict = model.decide(policies, workload, connection)
                reasons[verdict.reason] += 1
                reasons["dry run"] += verdict.dry_run != ""
                known[connection] = model.question(connection), model.line(verdict)
            asked, line = known[connection]
            questions.append(asked)
            expected.append(line)
        blocks.append(model.world([model.destination(workload, *HERE), *model.records(policies)], questions))
    said = model.ask(b"".join(blocks))
    print(len(said), dict(reasons))
    assert len(said) == WORLDS * EACH == 1_000_000
    assert min(reasons.values()) > 1000  # every kind of answer was tried
    assert len(reasons) == len(model.REASONS) + 1
    if said != expected:
        first = next(i for i, pair in enumerate(zip(said, expected, strict=True)) if pair[0] != pair[1])
        raise AssertionError(f"world {first // EACH}, question {first % EACH}: {said[first]}, not {expected[first]}")
