"""Sockets of the engine side: made, checked and written to without ever waiting."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import zmq

from swiftbalancer import endpoint as endpoints
from swiftbalancer.config import WorkerConfig
from swiftbalancer.endpoint import Endpoint
from swiftbalancer.errors import ConfigError, WorkerLost
from swiftbalancer.wire import MAX_MESSAGE_BYTES, Arrays, Message, encode_views


def connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, config: WorkerConfig) -> zmq.Socket[bytes]:
    """A DEALER socket on its way to `endpoint`; never blocks on send, forgets what is unsent at close."""
    if not config.spawn and endpoint.path is not None and not endpoints.owned_by_us(endpoint.path):
        raise WorkerLost(f"no worker of this user listens on {endpoint.text}; start one with `swiftbalancer worker`")
    try:
        client_secret = secret_key(config)
    except ConfigError as error:  # the file was there when the engine started
        raise WorkerLost(str(error)) from None
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 256)
    socket.setsockopt(zmq.RCVHWM, 16)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if config.server_public_key and client_secret:
        become_client(socket, server_public=config.server_public_key, client_secret=client_secret)
    try:
        socket.connect(endpoint.text)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise WorkerLost(f"cannot connect to {endpoint.text}: {error}") from None
    return socket


def become_client(socket: zmq.Socket[bytes], *, server_public: str, client_secret: str) -> None:
    """CURVE keys (Z85) of a socket that is to connect: the server's public one, and its own secret one."""
    secret = client_secret.encode()
    socket.curve_serverkey = server_public.encode()
    socket.curve_secretkey, socket.curve_publickey = secret, zmq.curve_public(secret)


def check_keys(config: WorkerConfig, endpoint: Endpoint | None) -> None:
    """Raises `ConfigError` for a network endpoint without keys, or keys that are none."""
    keys = {"server_public_key": config.server_public_key, "client_secret_key": secret_key(config)}
    for name, key in keys.items():
        if key is not None and len(key) != endpoints.CURVE_KEY_CHARACTERS:
            characters = endpoints.CURVE_KEY_CHARACTERS
            raise ConfigError(f"worker.{name}: a CURVE key in Z85 has {characters} characters, got {len(key)}")
    if endpoint is not None and endpoint.path is None:
        if config.spawn:
            raise ConfigError(f"worker.endpoint: a spawned worker listens on ipc:// only, got {endpoint.text}")
        if not endpoint.is_loopback and None in keys.values():
            raise ConfigError(
                f"worker.endpoint: {endpoint.text} is beyond this machine; set worker.server_public_key and "
                "worker.client_secret_key_file (`swiftbalancer keys` makes them)"
            )


def secret_key(config: WorkerConfig) -> str | None:
    """The client's own, as given or from the file; raises `ConfigError` if there is none in that."""
    path = config.client_secret_key_file
    if path is None or config.client_secret_key is not None:
        return config.client_secret_key
    keys = endpoints.read_keys(Path(path))
    if len(keys) != 1:
        raise ConfigError(f"worker.client_secret_key_file: {path} holds {len(keys)} keys, not one")
    return keys[0]


def send(socket: zmq.Socket[bytes], message: Message, arrays: Arrays | None = None) -> bool:
    """Sends without waiting; False if the peer's queue is full."""
    try:
        socket.send_multipart(encode_views(message, arrays), zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return False
    return True


def poll_ms(deadline: float) -> int | None:
    """Milliseconds from now to a monotonic time, for `zmq.Poller.poll`; None if it is infinitely far."""
    if deadline == float("inf"):
        return None
    return max(0, int(1000 * (deadline - time.monotonic())) + 1)


class Bell:
    """A pipe that wakes a thread from its poll. Ringing never waits, and is safe after `close`."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        self._lock = threading.Lock()
        self._closed = False
        for end in (self.fd, self._write):
            os.set_blocking(end, False)

    def ring(self) -> None:
        """Makes `fd` readable; a pipe that is full is readable already."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.write(self._write, b"!")

    def silence(self) -> None:
        """Empties the pipe."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Gives both ends back; call when nobody polls any more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)
                os.close(self._write)
