"""One HTTP/1.1 connection: uvicorn's protocol with the limits that it lacks.

    accepted --- head (bytes, headers, time) --- body --- answer (time) --- idle (time) --- head ...
                  431, 408, 400                                             closed

uvicorn limits neither the size nor the time of a request, parses all pipelined requests at once, and joins a header
that arrives in pieces in quadratic time (docs/adr/0019-door.md). Here the end of a head is found before it is parsed,
so that a head is bounded, and the next request of a connection is not parsed before the answer to the one before it.

Called by: uvicorn, through `server.py`. Calls: `door.py` for places and deadlines, `problems.py`.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from slatewise import metrics
from slatewise.errors import BadRequest, HeadersTooLarge, HeadersTooSlow, NoPlace, RankingError
from slatewise.http.door import PROBES, SINGLE, Door, address_of
from slatewise.http.problems import new_request_id, problem

END_OF_HEAD = b"\r\n\r\n"
MOST_HEADERS = 100
PIECE = 65_536  # bytes of a chunked body that are parsed at once: its end is not known before
MOST_FRAMING = 8  # bytes of chunk lengths, extensions and trailers, for each byte of a body; and PIECE for a short one
LINGER_SECONDS = 1.0  # after an early answer, a client may send on for so long: a reset would destroy the answer
LINGER_BYTES = 4 * 2**20
NEVER = math.inf
RESET = struct.pack("ii", 1, 0)  # linger for no time

HEAD, BODY, ANSWER, CLOSING = range(4)  # what is waited for


class Outlet:
    """The transport as a response sees it: to close the connection leaves the client time to read the response."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self.connection.close()


class Connection(HttpToolsProtocol):
    """`due` is the time of the event loop at which `on_due` is called."""

    def __init__(self, door: Door, **given: Any) -> None:
        super().__init__(**given)
        self.door = door
        self.address = ""
        self.due = NEVER
        self.state = HEAD
        self.has_begun = False  # whether a byte of the head has arrived
        self.head_left = door.limits.max_header_bytes
        self.tail = b""  # the last bytes of the head so far, which may begin the end of it
        self.body_left: int | None = None  # bytes of the body to come; None: chunked
        self.framing_left = 0  # bytes of a chunked body that may arrive before more of it must
        self.stays = False  # whether the connection is kept after the response
        self.overrun = False  # whether the next request began inside a piece of the body: it is dropped
        self.rest = b""  # received and not parsed: what follows the request that is being answered
        self.linger_left = LINGER_BYTES
        self.only_probes = False

    @property
    def is_idle(self) -> bool:
        """Whether the last answer is complete, and no byte of a next request was read."""
        return self.state == HEAD and not self.has_begun and not self.rest

    # Calls of the event loop

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.outlet = Outlet(self)
        self.address = address_of(self.client)
        self.due = self.loop.time() + self.door.limits.header_timeout_s
        place = self.door.enter(self)
        self.only_probes = place == "spare"
        if place in ("full", "address"):
            self.state = CLOSING
            metrics.CONNECTIONS_CLOSED.labels(place).inc()
            self.write_problem(NoPlace("too many connections"))
            transport.close()  # at once: there is no place to wait for the client

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self)
        self.due = NEVER
        self.rest = b""
        self.state = CLOSING
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.state == CLOSING:
            self.linger_left -= len(data)
            if self.linger_left < 0:
                self.transport.abort()
        elif self.rest:  # the transport had read it already
            self.keep(self.rest + data)
        else:
            self.take(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.due = self.loop.time() + self.door.limits.write_timeout_s

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.state == HEAD:
            self.wait_for_head()
            if self.rest:
                self.loop.call_soon(self.take_rest)
        elif self.state != CLOSING:
            self.due = NEVER

    # Framing

    def take(self, data: bytes) -> None:
        """Parse what belongs to the current request. Keep what follows it."""
        while data and self.state != CLOSING:
            if self.state == ANSWER:
                return self.keep(data)
            if self.state == HEAD:
                if not self.has_begun:
                    self.begin_head()
                piece, data = self.split_head(data)
                self.head_left -= len(piece)
                if self.head_left < 0:
                    most = self.door.limits.max_header_bytes
                    return self.refuse(HeadersTooLarge(f"the headers are longer than {most} bytes"), "header_size")
                self.parse(piece)
            elif self.body_left is not None:
                piece, data = data[: self.body_left], data[self.body_left :]
                self.body_left -= len(piece)
                self.parse(piece)
            else:
                self.framing_left -= len(data[:PIECE])
                self.parse(data[:PIECE])
                if self.framing_left < 0 and self.state == BODY:
                    return self.refuse(BadRequest("the body has more chunk lengths and trailers than data"), "headers")
                if data := data[PIECE:]:  # the chunks may be of one byte: let others have their turn
                    self.keep(data)
                    if self.state == BODY:
                        self.loop.call_soon(self.take_rest)
                    return

    def keep(self, data: bytes) -> None:
        self.rest = data
        self.transport.pause_reading()

    def split_head(self, data: bytes) -> tuple[bytes, bytes]:
        """Split behind the end of the head, if it is in `data`."""
        window = self.tail + data if self.tail else data
        at = window.find(END_OF_HEAD)
        if at < 0:
            self.tail = window[-len(END_OF_HEAD) + 1 :]
            return data, b""
        end = at + len(END_OF_HEAD) - len(self.tail)
        self.tail = b""
        return data[:end], data[end:]

    def parse(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # the request is answered without the other protocol
        except httptools.HttpParserError as error:
            cause = error.__context__
            known = cause if isinstance(cause, RankingError) else BadRequest("this is not HTTP/1.1")
            self.refuse(known, "headers" if known is cause else "not_http")

    def begin_head(self) -> None:
        """The first byte of a head: its time does not begin anew with each further byte."""
        self.has_begun = True
        self.door.wait(self)
        if self.cycle is not None:  # of a new connection, the time runs since it was made
            self.due = self.loop.time() + self.door.limits.header_timeout_s

    def wait_for_head(self) -> None:
        if not self.has_begun:
            self.due = self.loop.time() + self.door.limits.keep_alive_s

    def take_rest(self) -> None:
        """Go on with what was received and kept."""
        rest, self.rest = self.rest, b""
        if self.state in (HEAD, BODY) and not self.transport.is_closing():
            self.transport.resume_reading()
            self.take(rest)

    # Calls of the parser

    def on_message_begin(self) -> None:
        if self.state == ANSWER:  # a piece of a chunked body holds its end, and the next request
            self.overrun = True
        else:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self.overrun:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.overrun or self.state == BODY:  # a trailer is no header
            return
        if len(self.headers) >= MOST_HEADERS:
            raise HeadersTooLarge(f"more than {MOST_HEADERS} headers")
        name = name.lower()
        if name in SINGLE:
            for other, before in self.headers:
                if other == name and (before != value or name == b"host"):
                    raise BadRequest(f"the header {name.decode()} is there twice")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.overrun:
            return
        version = self.parser.get_http_version()
        names = {name for name, _ in self.headers}
        if version not in ("1.1", "1.0") or (version == "1.1" and b"host" not in names):
            raise BadRequest("an HTTP/1.1 request with the header Host is needed")
        if b"transfer-encoding" in names and (version == "1.0" or b"content-length" in names):
            raise BadRequest("Transfer-Encoding is not allowed in HTTP/1.0, and not beside Content-Length")
        self.state = BODY
        self.body_left = None
        self.framing_left = PIECE
        if b"transfer-encoding" not in names:
            self.body_left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        super().on_headers_complete()
        self.stays = self.cycle.keep_alive
        self.cycle.keep_alive = False  # until the body has arrived: the rest of it would be taken for a request
        self.cycle.scope["entered"] = time.perf_counter()  # type: ignore[typeddict-unknown-key]
        self.cycle.transport = self.outlet  # type: ignore[assignment]  # the part of a transport that it uses

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if self.only_probes and cycle.scope["path"] not in PROBES:
            raise NoPlace("too many connections")
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        if not self.overrun:
            self.framing_left += (1 + MOST_FRAMING) * len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.overrun:
            return
        self.state = ANSWER
        self.door.work(self)
        self.due = self.loop.time() + self.door.limits.write_timeout_s if self.flow.write_paused else NEVER
        if not self.cycle.response_started:
            self.cycle.keep_alive = self.stays
        super().on_message_complete()

    # Calls of the response

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.state == CLOSING or self.transport.is_closing():
            return
        if self.state == BODY or self.overrun:
            return self.close()
        self.flow.resume_reading()
        self.state = HEAD
        self.has_begun = False
        self.head_left = self.door.limits.max_header_bytes
        self.door.wait(self)
        if not self.flow.write_paused:
            self.wait_for_head()
            if self.rest:
                self.loop.call_soon(self.take_rest)

    # Ends

    def shutdown(self) -> None:
        self.stays = False
        super().shutdown()

    def refuse(self, error: RankingError, reason: str) -> None:
        """Answer for the application, and close. If a response has begun, only close."""
        metrics.CONNECTIONS_CLOSED.labels(reason).inc()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                return self.transport.abort()
            cycle.disconnected = True
            cycle.message_event.set()
        self.write_problem(error)
        self.close()

    def write_problem(self, error: RankingError) -> None:
        response = problem(error, new_request_id())
        headers = [*response.raw_headers, (b"connection", b"close")]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))

    def close(self) -> None:
        """Close once the client has read what was written. What it still sends is dropped."""
        if self.state == CLOSING:
            return
        is_whole = self.state == ANSWER and not self.rest and not self.overrun
        self.state = CLOSING
        self.rest = b""
        self.door.wait(self)
        if is_whole or not self.transport.can_write_eof():
            self.due = self.loop.time() + self.door.limits.write_timeout_s
            self.transport.close()
        else:
            self.due = self.loop.time() + LINGER_SECONDS
            self.flow.resume_reading()
            self.transport.resume_reading()
            self.transport.write_eof()

    def on_due(self) -> None:
        """A deadline has passed: of the head, of an idle connection, or of the client's reading."""
        self.due = NEVER
        if self.state == CLOSING:
            self.reset()
        elif self.flow.write_paused:
            metrics.CONNECTIONS_CLOSED.labels("write_timeout").inc()
            self.reset()
        elif self.has_begun:
            seconds = self.door.limits.header_timeout_s
            self.refuse(HeadersTooSlow(f"the headers did not arrive within {seconds:g} seconds"), "header_timeout")
        else:
            metrics.CONNECTIONS_CLOSED.labels("idle").inc()
            self.reset() if self.transport.get_write_buffer_size() else self.transport.close()

    def reset(self) -> None:
        """Close at once. The system drops what it holds for a client that does not read."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def evict(self) -> None:
        """Give the place to a new connection."""
        self.transport.close() if self.state == HEAD and not self.has_begun else self.transport.abort()
