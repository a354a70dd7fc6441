"""swiftbalancer inside vLLM: the `vllm.general_plugins` entry point.

vLLM calls `register` once in every process of an engine, so this module imports nothing heavy. Without the
`swiftbalancer` key in `--additional-config` the only trace is one wrapped method, `EngineArgs.create_engine_config`.
"""

from __future__ import annotations


def register() -> None:
    """Makes vLLM read its `swiftbalancer` flag; in a worker of an engine that has it, also hooks the engine."""
    from swiftbalancer_adaptors.vllm import flag

    flag.register()
