"""An API server of Kubernetes' for the commands of docs/kubernetes.md: `python apiserver.py --port 8001 --node n1`.

There is no real one to be had where these tests run. Which resources there are says the list that kmock has of a real cluster
(its own server is not for kubectl: of namespaces it knows only that something is in them); what objects may have, and how
patches are merged, say Kubernetes' published schemas (`schemas`). Of controllers there are those that make pods of DaemonSets and
StatefulSets, and that empty a namespace which is deleted. A pod is what its kubelet makes of it (`kubelet`): `exec` runs a
command beside this program, `port-forward` reaches `--pod-address`.

What it does not know: users and their rights, admission, defaults, server-side apply, quotas, schedules, networks, volumes,
images; nothing that a manifest starts runs.
"""

import argparse
import asyncio
import contextlib
import copy
import datetime
import functools
import json
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp.web
import kmock
import kubelet
import protobuf
import schemas

Object = dict[str, Any]
Key = tuple[str, str, str | None, str]

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[^/]+))?)?"
)
# How soon the controller of namespaces has emptied one.
EMPTIED = 1.0


class Failure(Exception):
    """What is answered instead."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": {},
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }


@dataclass(frozen=True)
class Target:
    """What a request is for."""

    group: str
    version: str
    namespace: str | None
    plural: str
    name: str | None
    sub: str | None

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}".lstrip("/")

    @property
    def key(self) -> Key:
        assert self.name is not None, "it is of one object"
        return (self.group, self.plural, self.namespace, self.name)

    def has(self, key: Key) -> bool:
        return key[:2] == (self.group, self.plural) and self.namespace in (None, key[2]) and self.name in (None, key[3])


class Selector:
    """Of labels and fields, by equality, as `-l` and kubectl itself give them."""

    def __init__(self, query: Any) -> None:
        self._labels = self._parsed(query.get("labelSelector", ""))
        self._fields = self._parsed(query.get("fieldSelector", ""))

    @staticmethod
    def _parsed(text: str) -> dict[str, str]:
        pairs = [re.fullmatch(r"([^=!]+)==?([^=]*)", term) for term in text.split(",") if term]
        if None in pairs:
            raise Failure(400, "BadRequest", f"this server does not know the selector {text!r}")
        return {pair[1]: pair[2] for pair in pairs if pair}

    def takes(self, item: Object) -> bool:
        labels = item["metadata"].get("labels", {})
        fields = {"metadata.name": item["metadata"]["name"], "metadata.namespace": item["metadata"].get("namespace")}
        return self._labels.items() <= labels.items() and self._fields.items() <= fields.items()


class ApiServer:
    """All objects, in memory."""

    def __init__(self, nodes: list[str], pod_address: str) -> None:
        self.resources = kmock.ResourcesArray()
        self.resources.load_bundled()
        self.pod_address = pod_address
        self.objects: dict[Key, Object] = {}
        self.changes = 0
        self.watches: list[tuple[Target, Selector, asyncio.Queue[Object]]] = []
        for name in nodes:
            self.put(("", "nodes", None, name), {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        for name in ("default", "kube-system"):
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            self.put(("", "namespaces", None, name), namespace)

    # Storage.

    def put(self, key: Key, item: Object) -> Object:
        """What is there from now on; whoever watches is told, and controllers act."""
        before = self.objects.get(key)
        self.changes += 1
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        of_server = {"uid": str(uuid.uuid4()), "creationTimestamp": now}
        metadata = of_server | item["metadata"] | {"resourceVersion": str(self.changes)}
        if key[2] is not None:
            metadata["namespace"] = key[2]
        item = item | {"metadata": metadata}
        if key[:2] == ("", "namespaces"):
            item.setdefault("status", {"phase": "Active"})
        self.objects[key] = item
        self.tell("ADDED" if before is None else "MODIFIED", key, item)
        self.control(key, item)
        return item

    def remove(self, key: Key) -> Object:
        """It, and what it owns."""
        item = self.objects.pop(key)
        self.tell("DELETED", key, item)
        owned = [k for k, v in self.objects.items() if item["metadata"]["uid"] in owners(v)]
        for other in owned:
            self.remove(other)
        return item

    def tell(self, what: str, key: Key, item: Object) -> None:
        for target, selector, events in self.watches:
            if target.has(key) and selector.takes(item):
                events.put_nowait({"type": what, "object": copy.deepcopy(item)})

    # Controllers.

    def control(self, key: Key, item: Object) -> None:
        """DaemonSets and StatefulSets have pods, and these run what their template says at once."""
        match key[:2]:
            case ("apps", "daemonsets"):
                nodes = [name for (_, plural, _, name) in list(self.objects) if plural == "nodes"]
                names = {f"{key[3]}-{node}": node for node in nodes}
            case ("apps", "statefulsets"):
                node = next(name for (_, plural, _, name) in self.objects if plural == "nodes")
                names = {f"{key[3]}-{number}": node for number in range(item["spec"].get("replicas", 1))}
            case _:
                return
        template = item["spec"]["template"]
        owner = {k: item[k] for k in ("apiVersion", "kind")} | {k: item["metadata"][k] for k in ("name", "uid")}
        for name, node in names.items():
            condition = {"type": "Ready", "status": "True"}
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": template["metadata"] | {"name": name, "ownerReferences": [owner]},
                "spec": template["spec"] | {"nodeName": node},
                "status": {"phase": "Running", "podIP": self.pod_address, "conditions": [condition]},
            }
            self.put(("", "pods", key[2], name), pod)
        owned = [k for k, v in self.objects.items() if item["metadata"]["uid"] in owners(v) and k[3] not in names]
        for pod_key in owned:
            self.remove(pod_key)

    def empty(self, key: Key) -> None:
        """What is in a namespace goes, and then it goes itself."""
        for other in [other for other in self.objects if other[2] == key[3]]:
            # Its owner may have taken it along.
            if other in self.objects:
                self.remove(other)
        self.remove(key)

    # Requests.

    async def __call__(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        try:
            return await self.serve(request)
        except Failure as failure:
            return aiohttp.web.json_response(failure.status, status=failure.code)

    async def serve(self, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        if request.path in self.api:
            return aiohttp.web.json_response(self.api[request.path])
        target = self.target(request.path)
        if target.sub is not None:
            return await self.serve_pod(target, request)
        if request.query.get("watch") in ("1", "true"):
            return await self.serve_watch(target, request)
        status, answer = self.answer(target, request, await request.read())
        return aiohttp.web.json_response(answer, status=status)

    def target(self, path: str) -> Target:
        parts = PATH.fullmatch(path)
        if parts is not None:
            target = Target(**parts.groupdict(default=None) | {"group": parts["group"] or ""})
            if self.kind(target) is not None:
                return target
        raise Failure(404, "NotFound", "the server could not find the requested resource")

    def kind(self, target: Target) -> str | None:
        resource = kmock.resource(target.group, target.version, target.plural)
        return self.resources[resource].kind if resource in self.resources else None

    @functools.cached_property
    def api(self) -> dict[str, Object]:
        """What there is, by paths: the lists of resources, and of OpenAPI that fields are validated here."""
        served = {"/api": {"kind": "APIVersions", "versions": ["v1"]}}
        groups: dict[str, list[Object]] = {}
        of_openapi = {}
        for group, version in dict.fromkeys((resource.group, resource.version) for resource in self.resources):
            name = f"{group}/{version}".lstrip("/")
            path = f"apis/{name}" if group else f"api/{name}"
            if group:
                groups.setdefault(group, []).append({"groupVersion": name, "version": version})
            resources = {r.plural: i for r, i in self.resources.items() if (r.group, r.version) == (group, version)}
            served[f"/{path}"] = {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": name,
                "resources": [
                    {
                        "name": plural,
                        "singularName": info.singular or "",
                        "namespaced": info.namespaced,
                        "kind": info.kind,
                        "verbs": sorted(info.verbs),
                        "shortNames": sorted(info.shortnames),
                    }
                    for plural, info in resources.items()
                ],
            }
            paths = {}
            for plural, info in resources.items():
                kind = {"group": group, "version": version, "kind": info.kind}
                parameters = [{"name": "fieldValidation", "in": "query"}]
                patch = {"x-kubernetes-group-version-kind": kind, "parameters": parameters}
                paths[f"/{path}/{plural}/{{name}}"] = {"patch": patch}
            served[f"/openapi/v3/{path}"] = {"openapi": "3.0.0", "info": {"title": "Kubernetes"}, "paths": paths}
            of_openapi[path] = {"serverRelativeURL": f"/openapi/v3/{path}"}
        of_groups = [{"name": name, "versions": all_, "preferredVersion": all_[0]} for name, all_ in groups.items()]
        served["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": of_groups}
        served["/openapi/v3"] = {"paths": of_openapi}
        return served

    def answer(self, target: Target, request: aiohttp.web.BaseRequest, body: bytes) -> tuple[int, Object]:
        found = self.objects.get(target.key) if target.name is not None else None
        if target.name is not None and found is None:
            raise Failure(404, "NotFound", f'{target.plural} "{target.name}" not found')
        match request.method, found:
            case "GET", None:
                selector = Selector(request.query)
                items = [item for key, item in self.objects.items() if target.has(key) and selector.takes(item)]
                metadata = {"resourceVersion": str(self.changes)}
                kind = f"{self.kind(target)}List"
                return 200, {"kind": kind, "apiVersion": target.api_version, "metadata": metadata, "items": items}
            case "GET", item if item is not None:
                return 200, item
            case "POST", None:
                return 201, self.create(target, decoded(request.content_type, body))
            case "PATCH", item if item is not None:
                return 200, self.patch(target, item, request.content_type, json.loads(body))
            case "DELETE", item if item is not None:
                return 200, self.delete(target)
            case method, _:
                raise Failure(405, "MethodNotAllowed", f"this server does not know how to {method} {target.plural}")

    def create(self, target: Target, item: Object) -> Object:
        self.validate(target, item)
        target = Target(**vars(target) | {"name": item["metadata"]["name"]})
        if target.namespace is not None:
            namespace = self.objects.get(("", "namespaces", None, target.namespace))
            if namespace is None:
                raise Failure(404, "NotFound", f'namespaces "{target.namespace}" not found')
            if namespace["status"]["phase"] == "Terminating":
                raise Failure(403, "Forbidden", f"namespace {target.namespace} is being terminated")
        if target.key in self.objects:
            raise Failure(409, "AlreadyExists", f'{target.plural} "{target.name}" already exists')
        return self.put(target.key, item)

    def patch(self, target: Target, item: Object, content_type: str, change: Object) -> Object:
        match content_type:
            case "application/merge-patch+json":
                patched = schemas.merge(item, change)
            case "application/strategic-merge-patch+json":
                schema = schemas.of_kind(item["apiVersion"], item["kind"])
                patched = schemas.merge_strategically(item, change, schema)
            case other:
                raise Failure(415, "UnsupportedMediaType", f"this server does not know {other}")
        self.validate(target, patched)
        return self.put(target.key, patched)

    def delete(self, target: Target) -> Object:
        if (target.group, target.plural) != ("", "namespaces"):
            return self.remove(target.key)
        item = self.objects[target.key]
        if item["status"]["phase"] == "Active":
            asyncio.get_running_loop().call_later(EMPTIED, self.empty, target.key)
        return self.put(target.key, item | {"status": {"phase": "Terminating"}})

    def validate(self, target: Target, item: Object) -> None:
        if (item.get("apiVersion"), item.get("kind")) != (target.api_version, self.kind(target)):
            raise Failure(400, "BadRequest", f"this is no {self.kind(target)} of {target.api_version}")
        if item["metadata"].get("namespace", target.namespace) != target.namespace:
            raise Failure(400, "BadRequest", "the namespace of the object is not that of the request")
        problem = schemas.problem(item)
        if problem is not None:
            raise Failure(422, "Invalid", f'{item["kind"]} "{item["metadata"].get("name")}" is invalid: {problem}')

    async def serve_watch(self, target: Target, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        """What has changed since the version that the request names, and what changes from now on."""
        selector = Selector(request.query)
        events: asyncio.Queue[Object] = asyncio.Queue()
        watch = (target, selector, events)
        is_list = request.query.get("sendInitialEvents") == "true"
        since = 0 if is_list else int(request.query.get("resourceVersion") or 0)
        for key, item in self.objects.items():
            if target.has(key) and selector.takes(item) and int(item["metadata"]["resourceVersion"]) > since:
                events.put_nowait({"type": "ADDED", "object": item})
        if is_list:
            end = {"resourceVersion": str(self.changes), "annotations": {"k8s.io/initial-events-end": "true"}}
            of_kind = {"apiVersion": target.api_version, "kind": self.kind(target)}
            events.put_nowait({"type": "BOOKMARK", "object": of_kind | {"metadata": end}})
        self.watches.append(watch)
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "application/json"})
        try:
            await response.prepare(request)
            while True:
                await response.write(json.dumps(await events.get()).encode() + b"\n")
        except ConnectionError:
            return response
        finally:
            self.watches.remove(watch)

    async def serve_pod(self, target: Target, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        pod = self.objects.get(target.key)
        if target.plural != "pods" or pod is None:
            raise Failure(404, "NotFound", f'{target.plural} "{target.name}" not found')
        match target.sub:
            case "exec":
                container = request.query.get("container", pod["spec"]["containers"][0]["name"])
                if container not in containers(pod):
                    raise Failure(400, "BadRequest", f"container {container} is not valid for pod {target.name}")
                return await kubelet.execute(request, request.query.getall("command"))
            case "portforward":
                return await kubelet.forward(request, pod["status"]["podIP"])
            case other:
                raise Failure(404, "NotFound", f"this server does not know pods/{other}")


def decoded(content_type: str, body: bytes) -> Object:
    try:
        return protobuf.decode(body) if content_type == "application/vnd.kubernetes.protobuf" else json.loads(body)
    except ValueError as problem:
        raise Failure(400, "BadRequest", f"this server cannot read it: {problem}") from problem


def owners(item: Object) -> set[str]:
    return {owner["uid"] for owner in item["metadata"].get("ownerReferences", [])}


def containers(pod: Object) -> Iterator[str]:
    return (container["name"] for container in pod["spec"]["containers"])


async def serve(arguments: argparse.Namespace) -> None:
    runner = aiohttp.web.ServerRunner(aiohttp.web.Server(ApiServer(arguments.node, arguments.pod_address)))
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    print(f"an API server on 127.0.0.1:{arguments.port}: ready", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--node", action="append", required=True, help="the name of a node; may be given more than once")
    parser.add_argument("--pod-address", default="127.0.0.1", help="where the ports of pods are")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
