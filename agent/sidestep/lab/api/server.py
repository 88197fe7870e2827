"""HTTP around the registry: paths, content types, answers.

One handler takes every request, because the paths of Kubernetes are data (`resources.KINDS`), not routes. Reads and
writes of objects never wait; only bodies and watches do. What is not served is answered 404 (no such resource) or 405
(the resource is there, the verb or subresource is not), with a `Status` of one line.
"""

import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from aiohttp import web

from sidestep.lab.api import discovery, selectors, tables
from sidestep.lab.api.access import Access, User
from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.registry import Deletion, Registry, kind_of
from sidestep.lab.api.resources import KINDS, NAMESPACE, REVIEWS, Kind
from sidestep.lab.api.store import Stored
from sidestep.lab.api.watches import WATCHES, Stream, Wish

MAX_BODY = 3 << 20
SHUTDOWN_S = 3.0
OPEN = frozenset({"/version", "/healthz", "/livez", "/readyz"})
PATCHES = {
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/json-patch+json": "json",
    "application/apply-patch+yaml": "apply",
}
_ELSEWHERE = {
    "log": "`sidestep lab logs NAMESPACE/POD` shows what a pod printed",
    "exec": "`sidestep lab exec NAMESPACE/POD -- COMMAND` runs a command in a pod",
    "attach": "`sidestep lab logs NAMESPACE/POD` shows what a pod prints",
    "portforward": "the pods' addresses are reached from the lab's nodes: `sidestep lab exec --node NODE -- COMMAND`",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names: a collection (`name` empty), an object, or a subresource."""

    kind: Kind
    namespace: str
    name: str = ""
    sub: str = ""


class Server:
    """The API over HTTP."""

    def __init__(self, registry: Registry, access: Access, clock: Callable[[], float]) -> None:
        self.registry = registry
        self.access = access
        self.store = registry.store
        self._clock = clock
        self._watches = 0

    def runner(self) -> web.AppRunner:
        """An aiohttp runner; the caller sets it up, adds sites and cleans it up."""
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)

        async def close(_: web.Application) -> None:
            self.store.close()

        app.on_shutdown.append(close)
        return web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S, handle_signals=False
        )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ApiError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.code == 401 else None
            return web.json_response(error.status(), status=error.code, headers=headers)
        except (RecursionError, UnicodeError):
            odd = ApiError(400, "the request is nested too deep, or holds what is not text")
            return web.json_response(odd.status(), status=400)
        except web.HTTPRequestEntityTooLarge:
            large = ApiError(413, f"the body is larger than {MAX_BODY} bytes")
            return web.json_response(large.status(), status=413)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/") or "/"
        if path in OPEN:
            if request.method not in ("GET", "HEAD"):
                raise _no_verb(request.method, path)
            return web.json_response(discovery.version()) if path == "/version" else web.Response(text="ok")
        user = self.access.authenticate(request.headers.get("Authorization", ""))
        steps = [step for step in path.split("/") if step]
        found = self._about(path, steps)
        if found is not None:
            if request.method not in ("GET", "HEAD"):
                raise _no_verb(request.method, path)
            return found
        if steps[:1] == ["api"] and len(steps) > 2:
            group, version, rest = "", steps[1], steps[2:]
        elif steps[:1] == ["apis"] and len(steps) > 3:
            group, version, rest = steps[1], steps[2], steps[3:]
        else:
            raise ApiError(404, f"the lab's API does not serve {path}")
        if any(review[:2] == (group, version) and [review[3]] == rest for review in REVIEWS):
            return await self._review(request, user, rest[0])
        return await self._resource(request, user, _target(group, version, rest, path))

    def _about(self, path: str, steps: list[str]) -> web.Response | None:
        """The answers about the API itself."""
        if path == "/openapi/v2":
            return web.Response(body=discovery.OPENAPI, content_type="application/octet-stream")
        document: Mapping[str, Any] | None = None
        if path == "/":
            document = {"paths": ["/api", "/apis", "/healthz", "/livez", "/openapi/v2", "/readyz", "/version"]}
        elif path == "/api":
            document = discovery.core()
        elif path == "/apis":
            document = discovery.groups()
        elif steps[:1] == ["apis"] and len(steps) == 2:
            document = discovery.group(steps[1])
        elif steps[:1] == ["apis"] and len(steps) == 3:
            document = discovery.resources(steps[1], steps[2])
        elif steps[:1] == ["api"] and len(steps) == 2:
            document = discovery.resources("", steps[1])
        return None if document is None else web.json_response(document)

    async def _review(self, request: web.Request, user: User, plural: str) -> web.Response:
        if request.method != "POST":
            raise _no_verb(request.method, plural)
        body = await _body(request)
        if plural == "tokenreviews":
            self.access.administrator(user, "tokenreviews.authentication.k8s.io")
            answer = self.access.review(body)
        elif plural == "selfsubjectreviews":
            answer = {
                "kind": "SelfSubjectReview",
                "apiVersion": "authentication.k8s.io/v1",
                "metadata": {},
                "status": {"userInfo": user.info()},
            }
        else:
            answer = self.access.may(user, body)
        return web.json_response(answer, status=201)

    # -- objects ---------------------------------------------------------------------------------------------------

    async def _resource(self, request: web.Request, user: User, target: Target) -> web.StreamResponse:
        kind, sub, query = target.kind, target.sub, request.query
        watching = query.get("watch", "") in ("1", "true", "True")
        if sub and sub not in kind.subresources:
            why = _ELSEWHERE.get(sub, "the lab does not have this subresource")
            raise ApiError(405, f"the lab's API does not serve {kind.plural}/{sub}: {why}")
        if sub == "token":
            if request.method != "POST":
                raise _no_verb(request.method, f"{kind.resource}/token")
            self.access.authorize(user, "create", kind, sub, target.namespace)
            answer = self.access.request(target.namespace, target.name, await _body(request))
            return web.json_response(answer, status=201)
        verb = _verb(request.method, target, watching)
        if verb not in kind.verbs:
            raise _no_verb(request.method, kind.resource + (f"/{sub}" if sub else ""))
        self.access.authorize(user, verb, kind, sub, target.namespace)
        if sub == "scale":
            return await self._scale(request, target)
        if verb == "watch":
            return await self._watch(request, target)
        if verb == "list":
            return self._list(request, target)
        if verb == "get":
            stored = self.store.need(kind, target.namespace, target.name)
            return _answer(request, kind, stored, self._clock())
        dry_run = _dry_run(query)
        if verb == "delete":
            options = _deletion(query, await _body(request, empty=True))
            last = self.registry.delete(kind, target.namespace, target.name, options)
            return _json(last.under(_version(request, kind)))
        if verb == "deletecollection":
            return self._delete_all(target, query, await _body(request, empty=True))
        if verb == "create":
            if kind.namespaced and not target.namespace:
                raise _no_verb("POST", f"{kind.resource} of all namespaces")
            stored = self.registry.create(kind, target.namespace, await _body(request), dry_run=dry_run)
            return _answer(request, kind, stored, self._clock(), 201)
        status = sub == "status"
        if verb == "update":
            body = await _body(request)
            stored = self.registry.update(kind, target.namespace, target.name, body, status=status, dry_run=dry_run)
            return _answer(request, kind, stored, self._clock())
        form = PATCHES.get(request.content_type)
        if form is None:
            raise ApiError(415, f"a patch cannot be {request.content_type}: {', '.join(PATCHES)} can")
        stored, created = self.registry.patch(
            kind,
            target.namespace,
            target.name,
            await _body(request),
            form,
            status=status,
            dry_run=dry_run,
            manager=query.get("fieldManager", ""),
        )
        return _answer(request, kind, stored, self._clock(), 201 if created else 200)

    async def _scale(self, request: web.Request, target: Target) -> web.Response:
        stored = self.store.need(target.kind, target.namespace, target.name)
        if request.method != "GET":
            body = await _body(request)
            spec = body.get("spec") if isinstance(body, dict) else None
            if not isinstance(spec, dict) or "replicas" not in spec:
                raise ApiError(400, "Scale: spec.replicas must be given")
            stored = self.registry.scale(target.namespace, target.name, spec["replicas"])
        metadata = stored.obj["metadata"]
        labels = stored.obj["spec"]["selector"]["matchLabels"]
        kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        return web.json_response(
            {
                "kind": "Scale",
                "apiVersion": "autoscaling/v1",
                "metadata": {key: metadata[key] for key in kept},
                "spec": {"replicas": stored.obj["spec"]["replicas"]},
                "status": {
                    "replicas": stored.obj.get("status", {}).get("replicas", 0),
                    "selector": ",".join(f"{key}={value}" for key, value in labels.items()),
                },
            }
        )

    def _matching(self, target: Target, query: Mapping[str, str]) -> list[Stored]:
        match = _predicate(target.kind, query)
        return [stored for stored in self.store.list(target.kind, target.namespace) if match(stored.obj)]

    def _list(self, request: web.Request, target: Target) -> web.Response:
        found = self._matching(target, request.query)
        kind, revision = target.kind, str(self.store.revision)
        if include := _table(request):
            rows = tables.table(kind, [stored.obj for stored in found], self._clock(), include, revision)
            return web.json_response(rows)
        version = _version(request, kind)
        head = {"kind": f"{kind.kind}List", "apiVersion": version, "metadata": {"resourceVersion": revision}}
        items = b",".join(item.under(version) for item in found)
        return _json(json.dumps(head)[:-1].encode() + b', "items": [' + items + b"]}")

    def _delete_all(self, target: Target, query: Mapping[str, str], body: Any) -> web.Response:
        options = _deletion(query, body)
        found = self._matching(target, query)
        for stored in found:
            self.registry.delete(target.kind, stored.namespace, stored.name, options)
        done = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return web.json_response({**done, "details": {"kind": target.kind.plural}})

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        query = request.query
        if query.get("sendInitialEvents"):
            raise ApiError(422, "sendInitialEvents: the lab's API does not stream lists", reason="Invalid")
        version = query.get("resourceVersion", "")
        match = _predicate(target.kind, query)
        if target.name:
            match = selectors.both(match, selectors.fields(target.kind, f"metadata.name={target.name}"))
        wish = Wish(
            kind=target.kind,
            namespace=target.namespace,
            match=match,
            since=None if version in ("", "0") else _number("resourceVersion", version),
            bookmarks=query.get("allowWatchBookmarks") == "true",
            seconds=float(_number("timeoutSeconds", query.get("timeoutSeconds", "1800"))),
            api_version=_version(request, target.kind),
            table=_table(request),
        )
        if self._watches >= WATCHES:
            raise ApiError(429, f"{WATCHES} watches are open, the lab's API has no more")
        self._watches += 1
        try:
            return await Stream(self.store, wish).serve(request)
        finally:
            self._watches -= 1


def _target(group: str, version: str, rest: list[str], path: str) -> Target:
    """What the rest of a path names; 404 for a resource that is not served."""
    namespace = ""
    inside = len(rest) > 2 and rest[0] == "namespaces"
    if inside and (group != "" or rest[2] not in NAMESPACE.subresources):
        namespace, rest = rest[1], rest[2:]
    kind = kind_of(group, version, rest[0])
    if kind is None or len(rest) > 3:
        full = f"{rest[0]}.{group}" if group else rest[0]
        served = ", ".join(kind.resource for kind in KINDS)
        raise ApiError(404, f"the lab's API does not serve {full} ({path}); it serves {served}")
    if bool(namespace) != kind.namespaced and (namespace or len(rest) > 1):
        why = "belongs to a namespace" if kind.namespaced else "belongs to no namespace"
        raise ApiError(404, f"the lab's API does not serve {path}: {kind.kind} {why}")
    return Target(kind, namespace, rest[1] if len(rest) > 1 else "", rest[2] if len(rest) > 2 else "")


def _verb(method: str, target: Target, watching: bool) -> str:
    if method in ("GET", "HEAD"):
        if watching and not target.sub:
            return "watch"
        return "get" if target.name else "list"
    named = {"PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    collection = {"POST": "create", "DELETE": "deletecollection"}
    if target.sub and method == "DELETE":
        raise _no_verb(method, f"{target.kind.resource}/{target.sub}")
    verb = (named if target.name else collection).get(method)
    if verb is None:
        raise _no_verb(method, target.kind.resource)
    return verb


def _no_verb(method: str, what: str) -> ApiError:
    return ApiError(405, f"the lab's API does not serve {method} of {what}")


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise ApiError(400, f"{name}: {text[:80]!r} is not a number")
    return int(text)


def _predicate(kind: Kind, query: Mapping[str, str]) -> selectors.Predicate:
    return selectors.both(
        selectors.labels(query.get("labelSelector", "")), selectors.fields(kind, query.get("fieldSelector", ""))
    )


def _dry_run(query: Mapping[str, str]) -> bool:
    value = query.get("dryRun", "")
    if value not in ("", "All"):
        raise ApiError(400, f"dryRun: {value!r} must be All")
    return value == "All"


def _deletion(query: Mapping[str, str], body: Any) -> Deletion:
    """Options from the body or the query."""
    options = body if isinstance(body, dict) else {}
    grace: Any = options.get("gracePeriodSeconds")
    if grace is None and "gracePeriodSeconds" in query:
        grace = _number("gracePeriodSeconds", query["gracePeriodSeconds"])
    if grace is not None and (not isinstance(grace, int) or isinstance(grace, bool) or grace < 0):
        raise ApiError(400, "gracePeriodSeconds must be a number, not negative")
    propagation = options.get("propagationPolicy") or query.get("propagationPolicy") or "Background"
    if options.get("orphanDependents"):
        propagation = "Orphan"
    if propagation not in ("Background", "Foreground", "Orphan"):
        raise ApiError(400, f"propagationPolicy: {propagation!r} must be Background, Foreground or Orphan")
    wanted = options.get("preconditions") or {}
    dry_run = _dry_run(query) or options.get("dryRun") == ["All"]
    return Deletion(grace, str(wanted.get("uid") or ""), str(wanted.get("resourceVersion") or ""), propagation, dry_run)


async def _body(request: web.Request, *, empty: bool = False) -> Any:
    """The body as JSON or YAML."""
    kind = request.content_type
    if "protobuf" in kind:
        raise ApiError(415, "the lab's API takes JSON and YAML, not protobuf")
    data = await request.read()
    if not data and empty:
        return {}
    try:
        if "yaml" in kind:
            # Through JSON: keys become strings, dates become text.
            return json.loads(json.dumps(yaml.safe_load(data), default=str, allow_nan=False))
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        form = "YAML" if "yaml" in kind else "JSON"
        line = " ".join(str(error).split())
        raise ApiError(400, f"the body is not {form}: {line}") from None


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _table(request: web.Request) -> str:
    """What the rows of a table are to carry, when the client prefers a table; else empty."""
    for part in request.headers.get("Accept", "").split(","):
        words = {word.strip() for word in part.split(";")}
        if {"as=Table", "v=v1"} <= words:
            return request.query.get("includeObject", "Metadata")
        if words & {"application/json", "*/*", "application/*"} and not any(word.startswith("as=") for word in words):
            return ""
    return ""


def _answer(request: web.Request, kind: Kind, stored: Stored, now: float, status: int = 200) -> web.Response:
    """One object, as a table where the client prefers that."""
    if request.method == "GET" and (include := _table(request)):
        return web.json_response(tables.table(kind, [stored.obj], now, include, str(stored.revision)))
    return _json(stored.under(_version(request, kind)), status)


def _version(request: web.Request, kind: Kind) -> str:
    """The version of the kind that a path asks for."""
    return "/".join(request.path.split("/")[2:4]) if kind.group else kind.api_version


def _json(data: bytes, status: int = 200) -> web.Response:
    return web.Response(body=data, status=status, content_type="application/json")


async def listen(runner: web.AppRunner, addresses: list[str], port: int, context: ssl.SSLContext) -> None:
    """Serves on these addresses. Raises OSError."""
    await runner.setup()
    for address in addresses:
        await web.TCPSite(runner, address, port, ssl_context=context, reuse_address=True).start()
