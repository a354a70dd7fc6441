"""YAML as far as files of ours need it: no aliases, which unfold to any size, and no deep nesting.

libyaml's composer calls itself once per level, without a bound, so that a line of brackets would end the process.
"""

from __future__ import annotations

from typing import Any

import msgspec

MAX_DEPTH = 64
MAX_BYTES = 16 << 20


def decode(text: bytes) -> Any:
    """The values of a document; raises `ValueError` if it is not such YAML, and for no other reason."""
    import yaml

    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} bytes of YAML; at most {MAX_BYTES} are read")
    try:
        _check(yaml, text)
        return msgspec.yaml.decode(text)
    except ValueError:
        raise
    except Exception as error:  # the parser's, and whatever scalars say that look like dates or numbers
        raise ValueError(f"not valid YAML: {error}") from None


def _check(yaml: Any, text: bytes) -> None:
    """Reads the events only, for which the parser needs no stack."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: aliases (*{event.anchor}) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
