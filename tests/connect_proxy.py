"""A small CONNECT proxy, as hospitals have them: it lets through, refuses, or opens TLS."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field

_MAX_HEAD_BYTES = 65536
_HEAD_TIMEOUT_S = 20.0


@dataclass
class ConnectProxy:
    """refuse: a status line instead of a tunnel. divert: connect there, whatever was asked for."""

    port: int = 0
    refuse: str = ""
    divert: tuple[str, int] | None = None
    # What was asked for, as in "CONNECT host:port HTTP/1.1", the methods of others among them.
    asked: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError), closing(writer):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_TIMEOUT_S)
            first = head.split(b"\r\n")[0].decode("latin-1")
            self.asked.append(first)
            method, target, *_ = first.split()
            status = "405 Method Not Allowed" if method != "CONNECT" else self.refuse
            if status:
                writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()
            else:
                host, _, port = target.rpartition(":")
                await self._tunnel(reader, writer, *(self.divert or (host, int(port))))

    async def _tunnel(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int
    ) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError), closing(sink):
        while block := await source.read(65536):
            sink.write(block)
            await sink.drain()


@contextmanager
def connect_proxy(
    host: str = "127.0.0.1",
    *,
    refuse: str = "",
    divert: tuple[str, int] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[ConnectProxy]:
    """Run a proxy in a thread of its own until the block ends. tls: it speaks TLS itself."""
    proxy = ConnectProxy(refuse=refuse, divert=divert)
    started: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async with await asyncio.start_server(
            proxy.serve, host, 0, ssl=tls, limit=_MAX_HEAD_BYTES
        ) as server:
            proxy.port = server.sockets[0].getsockname()[1]
            started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
            await stop.wait()

    # It cancels what is under way when it ends.
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    stop = started.result(timeout=20)
    try:
        yield proxy
    finally:
        stop()
        thread.join()
