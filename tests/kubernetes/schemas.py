"""What Kubernetes' published schemas say of an object: whether it is one, and how a patch is merged into it."""

import functools
import json
import pathlib
import re
from typing import Any

import jsonschema
import kubernetes_validate
import referencing

Object = dict[str, Any]

VERSION = "1.37.0"
_FOLDER = pathlib.Path(kubernetes_validate.__file__).parent / f"kubernetes-json-schema/v{VERSION}-local-strict"


def _load(name: str) -> Any:
    return json.loads((_FOLDER / name).read_text())


@functools.cache
def _definitions() -> Any:
    return _load("_definitions.json")


@functools.cache
def _registry() -> referencing.Registry:
    return referencing.Resource.from_contents(_definitions()) @ referencing.Registry()


@functools.cache
def of_kind(api_version: str, kind: str) -> Object:
    group, _, version = api_version.rpartition("/")
    # The first part of a group's name is enough.
    parts = [kind.lower(), group.split(".")[0], version]
    return _load("-".join(part for part in parts if part) + ".json")


def problem(item: Object) -> str | None:
    """What the strict schema does not take of an object: an unknown field too."""
    try:
        schema = of_kind(item["apiVersion"], item["kind"])
    except FileNotFoundError:
        return f"there is no {item['kind']} in {item['apiVersion']}"
    found = jsonschema.Draft202012Validator(schema, registry=_registry()).iter_errors(item)
    first = jsonschema.exceptions.best_match(found)
    return first and f"{first.json_path}: {first.message}"


def _resolved(schema: Object) -> Object:
    """With what it refers to, and what it says beside."""
    reference = schema.get("$ref")
    if reference is None:
        return schema
    return _definitions()["$defs"][reference.rpartition("/")[2]] | schema


def _directives(patch: Object) -> dict[str, Any]:
    return {key: value for key, value in patch.items() if re.match(r"\$(patch$|retainKeys$|\w+/)", key)}


def merge(current: Object, patch: Object) -> Object:
    """JSON Merge Patch, RFC 7386."""
    merged = dict(current)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            merged[key] = merge(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def merge_strategically(current: Object, patch: Object, schema: Object) -> Object:
    """Strategic merge patch, which merges lists of objects by a key, as their schema says.

    https://github.com/kubernetes/community/blob/main/contributors/devel/sig-api-machinery/strategic-merge-patch.md
    """
    directives = _directives(patch)
    kept = directives.get("$retainKeys", current.keys() | patch.keys())
    merged = {} if directives.get("$patch") == "replace" else {k: v for k, v in current.items() if k in kept}
    for directive, values in directives.items():
        name, _, field = directive.partition("/")
        if name == "$deleteFromPrimitiveList":
            merged[field] = [value for value in merged.get(field, []) if value not in values]
    fields = _resolved(schema).get("properties", {})
    for key in patch.keys() - directives.keys():
        value, field = patch[key], _resolved(fields.get(key, {}))
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = merge_strategically(merged.get(key) or {}, value, field)
        elif isinstance(value, list) and "merge" in field.get("x-kubernetes-patch-strategy", ""):
            order = directives.get(f"$setElementOrder/{key}", [])
            merged[key] = _merge_lists(merged.get(key) or [], value, field, order)
        else:
            merged[key] = value
    return merged


def _merge_lists(current: list[Any], patch: list[Any], schema: Object, order: list[Any]) -> list[Any]:
    key = schema.get("x-kubernetes-patch-merge-key")
    if key is None:
        # Of words: a set.
        merged = {value: value for value in [*current, *patch]}
        order_of = {value: place for place, value in enumerate(order)}
    else:
        merged = {item[key]: item for item in current}
        for item in patch:
            if item.get("$patch") == "delete":
                merged.pop(item[key], None)
            else:
                merged[item[key]] = merge_strategically(merged.get(item[key], {}), item, schema.get("items", {}))
        order_of = {item[key]: place for place, item in enumerate(order)}
    return [merged[name] for name in sorted(merged, key=lambda name: order_of.get(name, len(order)))]
