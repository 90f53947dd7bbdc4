"""The frames of SPDY/3.1 in which `kubectl port-forward` has its streams, within a WebSocket: as far as it uses them.

https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/
"""

import struct
import zlib
from dataclasses import dataclass

SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY = 1, 2, 3, 6, 7
FIN = 1
VERSION = 0x8003
LENGTH = 0xFF_FFFF

# Section 2.6.10.1: the words, each behind its length, and what follows them.
WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow"
    " authorization cache-control connection content-base content-encoding content-language content-length"
    " content-location content-md5 content-range content-type date etag expect expires from host if-match"
    " if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma"
    " proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade"
    " user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie"
    " keep-alive origin"
)
REST = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def _sized(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


DICTIONARY = b"".join(_sized(word.replace("_", " ").encode()) for word in WORDS.split(" ")) + REST.encode()


@dataclass(frozen=True)
class Opened:
    """The other side has begun a stream."""

    stream: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Data:
    """Of a stream; `last` where the other side sends nothing more on it."""

    stream: int
    data: bytes
    last: bool


@dataclass(frozen=True)
class Reset:
    """The other side wants no more of a stream."""

    stream: int


@dataclass(frozen=True)
class Ping:
    number: int


Event = Opened | Data | Reset | Ping


class Connection:
    """The side that does not begin streams."""

    def __init__(self) -> None:
        self._received = b""
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def receive(self, data: bytes) -> list[Event]:
        """What came with this, frame by frame: frames need not begin or end where messages do."""
        self._received += data
        events: list[Event] = []
        while len(self._received) >= 8:
            head, tail = struct.unpack_from(">II", self._received)
            end = 8 + (tail & LENGTH)
            if len(self._received) < end:
                break
            payload, self._received = self._received[8:end], self._received[end:]
            events += self._frame(head, tail >> 24, payload)
        return events

    def _frame(self, head: int, flags: int, payload: bytes) -> list[Event]:
        is_last = bool(flags & FIN)
        if head >> 31 == 0:
            return [Data(head, payload, is_last)]
        if head >> 16 != VERSION:
            raise ValueError(f"a frame of version {head >> 16:#x}")
        match head & 0xFFFF:
            case kind if kind == SYN_STREAM:
                (stream,) = struct.unpack_from(">I", payload)
                opened = Opened(stream, self._headers(payload[10:]))
                return [opened, Data(stream, b"", True)] if is_last else [opened]
            case kind if kind == RST_STREAM:
                return [Reset(struct.unpack_from(">I", payload)[0])]
            case kind if kind == PING:
                return [Ping(struct.unpack(">I", payload)[0])]
            case _:
                # Settings and the end, which need no answer.
                return []

    def _headers(self, block: bytes) -> dict[str, str]:
        rest = self._inflate.decompress(block)

        def number() -> int:
            nonlocal rest
            (value,), rest = struct.unpack_from(">I", rest), rest[4:]
            return value

        def text() -> str:
            nonlocal rest
            length = number()
            value, rest = rest[:length], rest[length:]
            return value.decode()

        return {text().lower(): text() for _ in range(number())}

    def accept(self, stream: int) -> bytes:
        """That a stream is taken."""
        block = self._deflate.compress(struct.pack(">I", 0)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return self._control(SYN_REPLY, struct.pack(">I", stream) + block)

    def pong(self, number: int) -> bytes:
        return self._control(PING, struct.pack(">I", number))

    def reset(self, stream: int) -> bytes:
        """That nothing more is wanted of a stream: cancelled."""
        return self._control(RST_STREAM, struct.pack(">II", stream, 5))

    @staticmethod
    def data(stream: int, data: bytes, last: bool = False) -> bytes:
        return struct.pack(">II", stream, (FIN << 24 if last else 0) | len(data)) + data

    @staticmethod
    def _control(kind: int, payload: bytes) -> bytes:
        return struct.pack(">HHI", VERSION, kind, len(payload)) + payload
