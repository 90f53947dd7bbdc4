"""What a kubelet does for `kubectl exec` and `kubectl port-forward`, of a pod that is processes of this machine.

https://kubernetes.io/docs/reference/using-api/ tells of neither protocol in full; KEP 4006 does:
https://github.com/kubernetes/enhancements/tree/master/keps/sig-api-machinery/4006-transition-spdy-to-websockets
"""

import asyncio
import contextlib
import json

import aiohttp.web
import spdy

EXEC = ("v5.channel.k8s.io", "v4.channel.k8s.io")
STDOUT, STDERR, ERROR = b"\x01", b"\x02", b"\x03"
PORT_FORWARD = "SPDY/3.1+portforward.k8s.io"
CHUNK = 32 * 1024


async def execute(request: aiohttp.web.BaseRequest, command: list[str]) -> aiohttp.web.StreamResponse:
    """Runs a command as if in a container: what it prints, and how it ended, each on a channel of its own."""
    socket = aiohttp.web.WebSocketResponse(protocols=EXEC)
    await socket.prepare(request)
    with contextlib.suppress(ConnectionError):
        await socket.send_bytes(ERROR + json.dumps(await _execute(socket, command)).encode())
        await socket.close()
    return socket


async def _execute(socket: aiohttp.web.WebSocketResponse, command: list[str]) -> dict[str, object]:
    pipe = asyncio.subprocess.PIPE
    null = asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=null, stdout=pipe, stderr=pipe)
    except OSError as error:
        return _failure("InternalError", f"exec of {command[0]!r} failed: {error}", "126")

    async def relay(channel: bytes, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(CHUNK):
            await socket.send_bytes(channel + data)

    assert process.stdout is not None and process.stderr is not None, "they are piped"
    await asyncio.gather(relay(STDOUT, process.stdout), relay(STDERR, process.stderr))
    code = await process.wait()
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return _failure("NonZeroExitCode", f"command terminated with non-zero exit code: {code}", str(code))


def _failure(reason: str, message: str, code: str) -> dict[str, object]:
    details = {"causes": [{"reason": "ExitCode", "message": code}]}
    return {"metadata": {}, "status": "Failure", "reason": reason, "message": message, "details": details}


async def forward(request: aiohttp.web.BaseRequest, address: str) -> aiohttp.web.StreamResponse:
    """Streams of a WebSocket to ports of an address: of each connection a pair, one for data and one for errors."""
    socket = aiohttp.web.WebSocketResponse(protocols=[PORT_FORWARD])
    await socket.prepare(request)
    forwarder = _Forwarder(socket, address)
    try:
        async for message in socket:
            await forwarder.receive(message.data)
    finally:
        forwarder.close()
    return socket


class _Forwarder:
    def __init__(self, socket: aiohttp.web.WebSocketResponse, address: str) -> None:
        self._socket, self._address = socket, address
        self._connection = spdy.Connection()
        # The stream for errors of a request, which comes before that for data.
        self._errors: dict[str, int] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._relays: set[asyncio.Task[None]] = set()

    async def receive(self, data: bytes) -> None:
        for event in self._connection.receive(data):
            match event:
                case spdy.Opened(stream, headers):
                    await self._socket.send_bytes(self._connection.accept(stream))
                    await self._opened(stream, headers)
                case spdy.Data(stream, chunk, last):
                    await self._write(stream, chunk, last)
                case spdy.Reset(stream):
                    if writer := self._writers.pop(stream, None):
                        writer.close()
                case spdy.Ping(number):
                    await self._socket.send_bytes(self._connection.pong(number))

    async def _opened(self, stream: int, headers: dict[str, str]) -> None:
        if headers["streamtype"] == "error":
            self._errors[headers["requestid"]] = stream
            return
        error = self._errors.pop(headers["requestid"])
        try:
            reader, self._writers[stream] = await asyncio.open_connection(self._address, int(headers["port"]))
        except OSError as problem:
            message = f"cannot reach port {headers['port']}: {problem}".encode()
            await self._socket.send_bytes(self._connection.data(error, message, last=True))
            await self._socket.send_bytes(self._connection.reset(stream))
            return
        relay = asyncio.create_task(self._relay(stream, error, reader))
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)

    async def _write(self, stream: int, chunk: bytes, last: bool) -> None:
        writer = self._writers.get(stream)
        if writer is None:
            return
        with contextlib.suppress(ConnectionError):
            writer.write(chunk)
            if last:
                writer.write_eof()
            await writer.drain()

    async def _relay(self, stream: int, error: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(CHUNK):
                await self._socket.send_bytes(self._connection.data(stream, chunk))
            await self._socket.send_bytes(self._connection.data(stream, b"", last=True))
            await self._socket.send_bytes(self._connection.data(error, b"", last=True))
        if writer := self._writers.pop(stream, None):
            writer.close()

    def close(self) -> None:
        for relay in self._relays:
            relay.cancel()
        for writer in self._writers.values():
            writer.close()
