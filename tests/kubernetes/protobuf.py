"""Kubernetes' Protobuf, as far as `kubectl create` writes it, which knows no other way: Namespaces and Secrets.

https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding; the numbers of fields are in generated.proto of
k8s.io/api/core/v1 and of k8s.io/apimachinery.
"""

import base64
from collections.abc import Callable, Iterator
from typing import Any

MAGIC = b"k8s\x00"

Field = tuple[str, Callable[[bytes], Any]]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Those that are words or messages, which is all that is read here."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        length, at = _varint(data, at)
        if tag & 7 == 2:
            yield tag >> 3, data[at : at + length]
            at += length
        elif tag & 7 != 0:
            raise ValueError(f"a field of wire type {tag & 7}")


def _message(known: dict[int, Field]) -> Callable[[bytes], dict[str, Any]]:
    def read(data: bytes) -> dict[str, Any]:
        message: dict[str, Any] = {}
        for number, value in _fields(data):
            if number not in known:
                if value:
                    raise ValueError(f"field {number} is not known here")
                continue
            name, decode = known[number]
            decoded = decode(value)
            message[name] = message.get(name, {}) | decoded if isinstance(decoded, dict) else decoded
        # What is empty is not there.
        return {name: value for name, value in message.items() if value not in ("", {})}

    return read


def _entry(decode: Callable[[bytes], str]) -> Callable[[bytes], dict[str, str]]:
    """One of a map."""

    def read(data: bytes) -> dict[str, str]:
        parts = dict(_fields(data))
        return {parts[1].decode(): decode(parts.get(2, b""))}

    return read


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


_METADATA = _message({1: ("name", bytes.decode), 3: ("namespace", bytes.decode), 11: ("labels", _entry(bytes.decode))})
_KINDS = {
    "Namespace": _message({1: ("metadata", _METADATA), 3: ("status", _message({1: ("phase", bytes.decode)}))}),
    "Secret": _message({1: ("metadata", _METADATA), 2: ("data", _entry(_base64)), 3: ("type", bytes.decode)}),
}
_TYPE = _message({1: ("apiVersion", bytes.decode), 2: ("kind", bytes.decode)})


def decode(data: bytes) -> dict[str, Any]:
    """An object; fails where it is none that is read here."""
    if not data.startswith(MAGIC):
        raise ValueError("this is no object of Kubernetes'")
    parts = dict(_fields(data[len(MAGIC) :]))
    of_type = _TYPE(parts[1])
    if of_type["kind"] not in _KINDS:
        raise ValueError(f"{of_type['kind']} is not read here")
    return of_type | _KINDS[of_type["kind"]](parts[2])
