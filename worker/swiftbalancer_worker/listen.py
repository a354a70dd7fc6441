"""The worker's sockets: one address, one owner, only for those who may."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from swiftbalancer.endpoint import DIRECTORY_PREFIX, Endpoint, check_folder, lock_path
from swiftbalancer.errors import ConfigError, EndpointInUse
from swiftbalancer.wire import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)
REPORT_EVERY_S = 10.0
Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Our secret key and the public keys of the engines that may connect (Z85, 40 characters each)."""

    server_secret: str
    client_publics: frozenset[str]


class Gate:
    """Asks for every CURVE client whether it may come in; the authenticator's thread calls it."""

    def __init__(self, keys: CurveKeys) -> None:
        self._allowed = {key.encode() for key in keys.client_publics}

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002
        """Whether the client with this public key (Z85) is known."""
        if key in self._allowed:
            return True
        log.warning("client with public key %s turned away: not authorised", key.decode())
        return False


class Doorbell:
    """Counts connections to a socket that never got as far as showing a key, and logs them now and then."""

    FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL

    def __init__(self, socket: Socket) -> None:
        self._events = socket.get_monitor_socket(self.FAILURES)
        self._count = 0
        self._next_s = 0.0

    def listen(self, now: float) -> None:
        """Takes what has happened since the last call; never waits. Who keeps trying is one line a while."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._events.recv_multipart(zmq.DONTWAIT)
                self._count += 1
        if self._count and now >= self._next_s:
            log.warning("connections=%d turned away: no CURVE handshake with our key", self._count)
            self._count, self._next_s = 0, now + REPORT_EVERY_S


class Listener:
    """Owns the endpoint: the lock beside it, the request socket and the read-only view socket.

    A socket file is for its user alone and needs no keys, even where the other socket has them.
    """

    def __init__(self, endpoint: Endpoint, *, view: Endpoint | None, keys: CurveKeys | None = None) -> None:
        """Raises `EndpointInUse` if another worker is there, `ConfigError` if an endpoint may not be used."""
        places = [place for place in (endpoint, view) if place is not None]
        for place in places:
            _check(place, keys)
        self.endpoint = endpoint
        self._paths = [place.path for place in places if place.path is not None]
        self._lock = _lock(endpoint.path) if endpoint.path is not None else None
        self._context: Context = zmq.Context()
        self._authenticator = None if keys is None else _authenticator(self._context, keys)
        try:
            self.requests = self._bound(zmq.ROUTER, endpoint, keys)
            self._doorbell = None if keys is None else Doorbell(self.requests)
            self.view = None if view is None else self._bound(zmq.PUB, view, keys)
        except BaseException:
            self.close()
            raise

    def _bound(self, kind: int, place: Endpoint, keys: CurveKeys | None) -> Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.SNDHWM, 64)
        socket.setsockopt(zmq.RCVHWM, 64)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES if kind == zmq.ROUTER else 4096)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None and place.path is None:
            socket.curve_secretkey = keys.server_secret.encode()
            socket.curve_publickey = zmq.curve_public(keys.server_secret.encode())
            socket.curve_server = True
        previous = os.umask(0o077)
        try:
            socket.bind(place.text)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            if error.errno == zmq.EADDRINUSE:
                raise EndpointInUse(f"{place.text} is in use by another process; choose another endpoint") from None
            raise ConfigError(f"cannot listen on {place.text}: {error}") from None
        finally:
            os.umask(previous)
        return socket

    def receive(self, max_frames: int) -> list[bytes] | None:
        """One message with its peer first, None if there is none; frames beyond `max_frames` are dropped."""
        try:
            frames = [self.requests.recv(zmq.DONTWAIT)]
        except zmq.Again:
            return None
        while self.requests.getsockopt(zmq.RCVMORE):
            frame = self.requests.recv(zmq.DONTWAIT)
            if len(frames) <= max_frames:
                frames.append(frame)
        return frames

    def reply(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """Sends without waiting; a peer that is gone or does not read loses the message."""
        try:
            self.requests.send_multipart([peer, *frames], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            log.warning("a reply is lost: %s", error)

    def publish(self, frame: bytes) -> None:
        """Shows the live view to whoever looks; never waits."""
        if self.view is not None:
            self.view.send(frame, zmq.DONTWAIT)

    def check_door(self, now: float) -> None:
        """Logs who could not even say which key they have."""
        if self._doorbell is not None:
            self._doorbell.listen(now)

    def close(self) -> None:
        """Closes the sockets and removes their files; the folder too if an engine made it for us."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=200)
        for path in self._paths:
            path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()
        folder = self.endpoint.path.parent if self.endpoint.path else None
        if folder is not None and folder.name.startswith(DIRECTORY_PREFIX):
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclass(frozen=True, slots=True)
class _Lock:
    """An flock(2) on a file beside the socket: gone with its owner, however that ends."""

    path: Path
    fd: int

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.fd)


def _check(place: Endpoint, keys: CurveKeys | None) -> None:
    """Raises `ConfigError` for a socket that others could reach without a key, or put their own in place of."""
    if not place.is_loopback and keys is None:
        raise ConfigError(
            f"{place.text} is beyond this machine and needs CURVE keys: give --server-key and --clients "
            "(`swiftbalancer keys` makes them)"
        )
    if place.path is None:
        return
    try:
        check_folder(place.path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {place.text}: {error.strerror}") from None


def _lock(path: Path) -> _Lock:
    """The lock of the endpoint at `path`; raises `EndpointInUse`, or `ConfigError` for a path no socket can have."""
    try:
        return _locked(path)
    except OSError as error:
        raise ConfigError(f"cannot listen on ipc://{path}: {error.strerror}") from None


def _locked(path: Path) -> _Lock:
    """Takes the lock; files a dead worker left there are removed."""
    beside = lock_path(path)
    while True:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise EndpointInUse(
                f"ipc://{path} is in use: another worker listens there; stop it or choose another endpoint"
            ) from None
        if _is_still(beside, fd):
            path.unlink(missing_ok=True)
            return _Lock(beside, fd)
        os.close(fd)


def _is_still(path: Path, fd: int) -> bool:
    """Whether `fd` is the file at `path`, and not one that its owner removed between our open and our lock."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _authenticator(context: Context, keys: CurveKeys) -> ThreadAuthenticator:
    authenticator = ThreadAuthenticator(context, log=logging.getLogger(__name__ + ".zap"))
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=Gate(keys))
    return authenticator
