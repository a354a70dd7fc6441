"""Where a worker listens: endpoints, who may reach them, and keys for links between hosts.

An `ipc://` endpoint is a socket file that only its owner may open, in a folder nobody else may write to. A
`tcp://` endpoint beyond the loopback interface needs CURVE keys (curvezmq.org). No zmq is imported here.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from swiftbalancer.errors import ConfigError

MAX_IPC_PATH_BYTES = 107
"""`sun_path` of a Unix socket address on Linux, without its final zero."""
DIRECTORY_PREFIX = f"swiftbalancer-{os.getuid()}-"
SOCKET_NAME = "worker.sock"
VIEW_SUFFIX = ".view"
LOCK_SUFFIX = ".lock"
CURVE_KEY_CHARACTERS = 40
LEFTOVER_AGE_S = 60.0
"""A socket younger than this may belong to a worker that is about to lock it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed endpoint: `path` for `ipc://`, else `host` and `port`."""

    text: str
    path: Path | None = None
    host: str = ""
    port: int = 0

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine can reach it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def view(self) -> Endpoint | None:
        """Endpoint of the read-only live view that goes with an `ipc://` endpoint."""
        if self.path is None:
            return None
        return Endpoint(self.text + VIEW_SUFFIX, path=self.path.with_name(self.path.name + VIEW_SUFFIX))


def parse(text: str, *, name: str = "worker.endpoint") -> Endpoint:
    """The endpoint in `text`; raises `ConfigError` saying what is wrong with it, after the setting's `name`."""
    if text.startswith("ipc://"):
        path = Path(text[len("ipc://") :])
        if not path.is_absolute():
            raise ConfigError(f"{name}: {text!r} needs an absolute path, like ipc:///run/user/0/sb.sock")
        if len(os.fsencode(path)) + len(VIEW_SUFFIX) > MAX_IPC_PATH_BYTES:
            raise ConfigError(
                f"{name}: the path of {text!r} has {len(os.fsencode(path))} bytes; at most "
                f"{MAX_IPC_PATH_BYTES - len(VIEW_SUFFIX)} fit a socket address"
            )
        return Endpoint(text, path=path)
    if text.startswith("tcp://"):
        host, _, port = text[len("tcp://") :].rpartition(":")
        if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ConfigError(f"{name}: {text!r} is not tcp://HOST:PORT with a port in 1..65535")
        return Endpoint(text, host=host, port=int(port))
    raise ConfigError(f"{name}: {text!r} is neither ipc:///PATH nor tcp://HOST:PORT")


def private_endpoint() -> Endpoint:
    """A fresh `ipc://` endpoint in a new 0700 folder of our own; removes what dead workers left."""
    _remove_leftovers()
    folder = tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=_short_temporary_folder())
    return parse(f"ipc://{folder}/{SOCKET_NAME}")


def find_endpoints() -> list[Endpoint]:
    """`ipc://` endpoints of this user's workers on this machine that have a view beside them, oldest first."""
    sockets = {path for path in (*_private_sockets(), *_viewed_sockets()) if owned_by_us(path) and is_served(path)}
    return [parse(f"ipc://{path}") for path in sorted(sockets, key=lambda path: path.stat().st_mtime)]


def read_keys(path: Path) -> list[str]:
    """The CURVE keys in a file, one a line, without comments; raises `ConfigError` if one of them is none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if wrong := [key for key in keys if len(key) != CURVE_KEY_CHARACTERS]:
        raise ConfigError(
            f"{path}: a CURVE key in Z85 has {CURVE_KEY_CHARACTERS} characters, got {len(wrong[0])}; "
            "`swiftbalancer keys` makes them"
        )
    return keys


def read_key(path: Path) -> str:
    """The first key in a file; raises `ConfigError` if there is none."""
    keys = read_keys(path)
    if not keys:
        raise ConfigError(f"{path}: holds no CURVE key")
    return keys[0]


def lock_path(path: Path) -> Path:
    """The file a worker holds a lock on while it listens on the socket at `path`."""
    return path.with_name(path.name + LOCK_SUFFIX)


def is_served(path: Path) -> bool:
    """Whether a living worker holds the socket file at `path`."""
    try:
        fd = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _private_sockets() -> list[Path]:
    folder = Path(_short_temporary_folder())
    return [path for path in folder.glob(f"{DIRECTORY_PREFIX}*/{SOCKET_NAME}") if owned_by_us(path)]


def _viewed_sockets() -> list[Path]:
    """Sockets whose view is in the kernel's table, wherever workers started by hand put them; Linux only."""
    try:
        lines = Path("/proc/net/unix").read_bytes().splitlines()
    except OSError:
        return []
    names = {os.fsdecode(line.split(maxsplit=7)[7]) for line in lines if line.endswith(VIEW_SUFFIX.encode())}
    return [Path(name.removesuffix(VIEW_SUFFIX)) for name in names if name.startswith("/")]


def _remove_leftovers() -> None:
    """Removes private folders whose worker was killed together with its engine."""
    for path in _private_sockets():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S and not is_served(path):
                shutil.rmtree(path.parent, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Raises `ConfigError` if others could put a socket of their own in the place of ours at `path`."""
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid not in (0, os.getuid()):
        raise ConfigError(f"ipc://{path}: {folder} belongs to user {info.st_uid}; use a folder of your own")
    writable = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if writable and not info.st_mode & stat.S_ISVTX:
        raise ConfigError(f"ipc://{path}: others may write to {folder}; use a private folder (chmod 700)")


def owned_by_us(path: Path) -> bool:
    """Whether the socket file at `path` was made by this user or by root."""
    try:
        info = path.stat()
    except OSError:
        return False
    return stat.S_ISSOCK(info.st_mode) and info.st_uid in (0, os.getuid())


def _short_temporary_folder() -> str:
    """The temporary folder, or /tmp where its name is too long for a socket address."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) < 60 else "/tmp"
