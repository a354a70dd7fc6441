"""`python -m swiftbalancer_worker`: the worker process, started by an engine or by `swiftbalancer worker`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swiftbalancer import endpoint as endpoints
from swiftbalancer.errors import BalancerError, ConfigError

if TYPE_CHECKING:
    from swiftbalancer_worker.listen import CurveKeys

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
log = logging.getLogger("swiftbalancer_worker")


@dataclass(frozen=True, slots=True)
class Options:
    """How to run one worker."""

    endpoint: str
    policy: str | None = None
    view: str | None = None
    record: Path | None = None
    parent: int | None = None
    log_level: str = "info"
    niceness: int = 0
    cpus: tuple[int, ...] | None = None
    server_key: Path | None = None
    clients: Path | None = None


def run(options: Options) -> None:
    """Serves until asked to end; raises `ConfigError`, `UnknownPolicy` or `EndpointInUse` if it cannot start."""
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")  # numpy reads them when it is imported, below for the first time
    from swiftbalancer_worker.listen import Listener
    from swiftbalancer_worker.loop import serve
    from swiftbalancer_worker.process import Lifeline, step_aside
    from swiftbalancer_worker.service import Service, ServiceOptions

    logging.basicConfig(level=options.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    endpoint = endpoints.parse(options.endpoint)
    view = endpoint.view if options.view is None else endpoints.parse(options.view, name="--view")
    local = endpoint.path is not None
    service = Service(ServiceOptions(endpoint.text, options.policy, options.record, engines_may_record=local))
    lifeline = Lifeline(options.parent)
    step_aside(options.niceness, options.cpus)
    listener = Listener(endpoint, view=view, keys=_keys(options))
    try:
        log.info("listening endpoint=%s pid=%d", endpoint.text, os.getpid())
        serve(service, listener, lifeline)
        log.info("ending: %s", lifeline.reason)
    finally:
        service.close()
        listener.close()
        lifeline.close()


def _keys(options: Options) -> CurveKeys | None:
    from swiftbalancer_worker.listen import CurveKeys

    if options.server_key is None and options.clients is None:
        return None
    if options.server_key is None or options.clients is None:
        raise ConfigError("--server-key and --clients go together")
    return CurveKeys(endpoints.read_key(options.server_key), frozenset(endpoints.read_keys(options.clients)))


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; exits with usage on a wrong one."""
    parser = argparse.ArgumentParser(prog="swiftbalancer_worker", description=__doc__)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--policy")
    parser.add_argument("--view")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--niceness", type=int, default=0)
    parser.add_argument("--cpus", type=lambda text: tuple(int(c) for c in text.split(",")))
    parser.add_argument("--server-key", type=Path)
    parser.add_argument("--clients", type=Path)
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a clean end, 2 if the worker cannot start."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        run(options)
    except BalancerError as error:
        print(f"ERROR swiftbalancer_worker: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
