"""The site agent: one hospital's own side as a process that stays, reached over a unix socket.

It alone opens records, model, ledger and keys. The relay, whose code comes from the coordinator, hands it
signed tasks and carries its signed replies; it learns from it nothing else, not even why something failed.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.agent_pb2 import (
    AgentStatus,
    CancelReply,
    CancelRequest,
    Opening,
    Piece,
    StatusRequest,
    Work,
)
from client.agent_wire import (
    AGENT_SERVICE,
    CHANNEL_OPTIONS,
    CONTROL_SERVICE,
    in_pieces,
    socket_address,
    take_adapter,
    take_opening,
)
from client.site import Site
from client.spool import spooled
from client.turn import Caller
from common.errors import BusyError, ConsiliumError, DiskError, EngineError, ProtocolError
from common.locks import LockHeldError, hold_lock
from common.records import Envelope, Task, error_code

logger = logging.getLogger(__name__)

# One trains; the others introduce the site, or are told that it is busy.
_HANDLERS = 4
# A relay that is cut off in the middle of its reply asks again, so there is no reason to wait for long.
_GRACE_S = 5.0
# So long an adapter may take one way; 200 MB take a second.
_TRANSFER_S = 300.0
_SOCKET_MODE, _CONTROL_MODE = 0o660, 0o600


# Whoever does not wait behind another task.
_TO_BE_TOLD = Caller(waits=False)


@dataclass(slots=True)
class _Work:
    """What is trained now, as the status tells it."""

    run_uid: str
    server_round: int
    steps: int
    since: float
    cancelled: threading.Event
    step: int = 0


class Agent:
    """Answers tasks with one site's signed replies. Its methods are gRPC's handlers.

    idle_s: after so long without a task the base model and the records leave the memory.
    """

    def __init__(self, site: Site, *, idle_s: float) -> None:
        self._site = site
        self._idle_s = idle_s
        self._since = time.time()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._in_flight = 0
        self._answered = 0
        self._last_answer = 0.0

    def answer(self, pieces: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[Piece]:
        """Bring a signed task to the site and its signed reply back.

        Aborts with RESOURCE_EXHAUSTED when another task is trained, UNAVAILABLE while the agent ends, ABORTED
        when the disk cannot take the adapter, FAILED_PRECONDITION for another version of the protocol,
        INVALID_ARGUMENT for what no believed coordinator signed. It says no more than a code: a relay may
        tell the coordinator.
        """
        gone = threading.Event()
        context.add_callback(gone.set)
        try:
            with _in_time(context):
                opening = take_opening(pieces)
        except ConsiliumError as error:
            # Of versions alone.
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        with self._in_hand():
            reply = self._reply(opening, pieces, gone, context)
        with _in_time(context):
            yield from in_pieces(reply)

    def status(self, request: StatusRequest, context: grpc.ServicerContext) -> AgentStatus:
        """Tell the hospital's people what the agent does."""
        with self._lock:
            work = self._work
            return AgentStatus(
                version=importlib.metadata.version("consilium"),
                site=self._site.config.site.name,
                pid=os.getpid(),
                since=self._since,
                work=None if work is None else Work(
                    run=work.run_uid, server_round=work.server_round, step=work.step,
                    steps=work.steps, since=work.since,
                ),
                base_digest=self._site.loaded_base,
                answered=self._answered,
                last_answer=self._last_answer,
            )  # fmt: skip

    def cancel(self, request: CancelRequest, context: grpc.ServicerContext) -> CancelReply:
        """Stop what is trained, at its next step."""
        with self._lock:
            if self._work is None:
                return CancelReply(stopped=False)
            self._work.cancelled.set()
            return CancelReply(stopped=True)

    def stop(self) -> None:
        """Let whatever is trained stop at its next step; nothing else is taken on."""
        self._stopping.set()

    def keep_tidy(self) -> None:
        """Write down what was only counted, and drop what nobody has asked for in long; until `stop`."""
        while not self._stopping.wait(min(5.0, self._idle_s / 2)):
            self._site.refusals.close_minute()
            self._drop_idle()

    def _drop_idle(self) -> None:
        with self._lock:
            last = self._last_answer
            if self._in_flight or not last or time.time() - last < self._idle_s:
                return
            if not self._site.loaded_base:
                return
            # Within the lock: a task that comes now loads it again.
            self._site.release_base()
        _give_back_memory()
        logger.info("no task for %g s: the base model has left the memory", self._idle_s)

    def _reply(
        self,
        opening: Opening,
        pieces: Iterator[Piece],
        gone: threading.Event,
        context: grpc.ServicerContext,
    ) -> Envelope:
        state = self._site.config.folder / "state"

        def receive(write: Callable[[bytes], object]) -> None:
            with _in_time(context):
                take_adapter(pieces, opening, write=write)

        try:
            # Before its adapter: nothing of nobody's is written down, and who must wait need not send it.
            bare = Envelope(opening.payload, opening.signature)
            task, signer = self._site.admit(bare, caller=_TO_BE_TOLD)
            limit = self._site.adapter_limit(task, signer)
            if not limit:
                reply = self._answer(bare, gone)
            elif opening.adapter_bytes > limit:
                raise ProtocolError(
                    f"an adapter of {opening.adapter_bytes} bytes comes, where {limit} are the most"
                )
            else:
                with spooled(state, size_bytes=opening.adapter_bytes, receive=receive) as adapter:
                    reply = self._answer(replace(bare, adapter=adapter), gone)
        except BusyError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.code)
        except Exception as error:
            known = isinstance(error, ConsiliumError)
            logger.error("no answer: %s", error if known else type(error).__name__)
            code = error_code(error)
            full = code == DiskError.code
            status = grpc.StatusCode.ABORTED if full else grpc.StatusCode.INVALID_ARGUMENT
            context.abort(status, code)
        if self._stopping.is_set():
            # What was cut short by that is no answer: it begins anew when it is asked again.
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        return reply

    def _answer(self, envelope: Envelope, gone: threading.Event) -> Envelope:
        cancelled = threading.Event()

        def begin(task: Task) -> None:
            trains = task.kind == "train"
            steps = int(task.config.get("train.local-steps", 0)) if trains else 0
            self._work = _Work(task.run_uid, task.server_round, steps, time.time(), cancelled)

        def step_done(step: int) -> None:
            if self._work is not None:
                self._work.step = step

        def is_there() -> bool:
            return not (gone.is_set() or cancelled.is_set() or self._stopping.is_set())

        caller = Caller(is_there=is_there, waits=False, on_begin=begin, on_step=step_done)
        try:
            return self._site.answer(envelope, caller=caller)
        finally:
            with self._lock:
                if self._work is not None and self._work.cancelled is cancelled:
                    self._work = None

    @contextmanager
    def _in_hand(self) -> Iterator[None]:
        """Count a call as under way, and as answered if it is."""
        with self._lock:
            self._in_flight += 1
        try:
            yield
            with self._lock:
                self._answered += 1
                self._last_answer = time.time()
        finally:
            with self._lock:
                self._in_flight -= 1


def run_agent(site: Site) -> None:
    """Serve a site's agent until SIGTERM, SIGINT or SIGHUP.

    Raises EngineError when another one serves this folder, or a socket cannot be made.
    """
    config = site.config
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(config.folder / "state" / "agent.lock"))
        except LockHeldError as error:
            raise EngineError(
                f"process {error.pid} is the agent of {config.folder} already; leave it, or end it "
                f"first: kill {error.pid}"
            ) from None
        agent, stop = Agent(site, idle_s=config.agent.idle_unload_s), threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: stop.set())
        pools = [
            stack.enter_context(ThreadPoolExecutor(_HANDLERS, name)) for name in ("relay", "own")
        ]
        relay = _server(_answering(agent), pools[0])
        control = _server(_controlling(agent), pools[1])
        _listen(relay, config.socket_path, mode=_SOCKET_MODE, stack=stack)
        _listen(control, config.control_socket_path, mode=_CONTROL_MODE, stack=stack)
        threading.Thread(target=agent.keep_tidy, name="idle", daemon=True).start()
        logger.info("agent of %s, listening on %s", config.site.name, config.socket_path)
        stop.wait()
        agent.stop()
        for ended in [server.stop(_GRACE_S) for server in (relay, control)]:
            ended.wait()
        site.refusals.close_minute(at_once=True)


def _answering(agent: Agent) -> grpc.GenericRpcHandler:
    answer: grpc.RpcMethodHandler[Piece, Piece] = grpc.stream_stream_rpc_method_handler(
        agent.answer,
        request_deserializer=Piece.FromString,
        response_serializer=Piece.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(AGENT_SERVICE, {"Answer": answer})


def _controlling(agent: Agent) -> grpc.GenericRpcHandler:
    status = grpc.unary_unary_rpc_method_handler(
        agent.status,
        request_deserializer=StatusRequest.FromString,
        response_serializer=AgentStatus.SerializeToString,
    )
    cancel = grpc.unary_unary_rpc_method_handler(
        agent.cancel,
        request_deserializer=CancelRequest.FromString,
        response_serializer=CancelReply.SerializeToString,
    )
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Status": status, "Cancel": cancel}
    return grpc.method_handlers_generic_handler(CONTROL_SERVICE, methods)


def _server(handlers: grpc.GenericRpcHandler, pool: ThreadPoolExecutor) -> grpc.Server:
    """pool: outlives the server, so that no handler is left when the agent says that it has ended."""
    # Whoever is one too many is told so, as by a busy agent.
    server = grpc.server(
        pool, handlers=[handlers], options=CHANNEL_OPTIONS, maximum_concurrent_rpcs=_HANDLERS
    )
    servicer = health.HealthServicer()
    servicer.set(AGENT_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return server


@contextmanager
def _in_time(context: grpc.ServicerContext) -> Iterator[None]:
    """Cut a call off that brings or fetches nothing for long: it would hold a handler."""
    timer = threading.Timer(_TRANSFER_S, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _listen(server: grpc.Server, socket: Path, *, mode: int, stack: ExitStack) -> None:
    """Let a server listen on a socket that nobody but owner and group could ever open."""
    try:
        address = stack.enter_context(socket_address(socket))
        # One that a killed agent left.
        socket.unlink(missing_ok=True)
        before = os.umask(0o777 & ~mode)
        try:
            server.add_insecure_port(address)
        finally:
            os.umask(before)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "refused"
        raise EngineError(
            f"the agent cannot listen on {socket} ({reason}); make its folder, or name another one as "
            "socket in [agent] of site.toml"
        ) from None
    server.start()


def _give_back_memory() -> None:
    """Hand freed memory back to the system: the C library keeps it otherwise."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
