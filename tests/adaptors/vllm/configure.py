"""Builds engine configurations of real vLLM, without engines: `configure.py CASES.json OUT`.

A case is a dict of `EngineArgs`, and optionally `_version`, what vLLM claims to be, and `_policy`, a policy of vLLM's
own that it does not have yet. Its result is what came out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    case = dict(case)
    version = vllm.__version__
    vllm.__version__ = case.pop("_version", version)
    policy = case.pop("_policy", None)
    os.environ.pop(RAY_COPIES, None)
    try:
        arguments = EngineArgs(**case)
        if policy:
            object.__setattr__(arguments.eplb_config, "policy", policy)
        parallel = arguments.create_engine_config().parallel_config
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        vllm.__version__ = version
    eplb = parallel.eplb_config
    return {
        "enabled": parallel.enable_eplb,
        "redundant": eplb.num_redundant_experts,
        "async": eplb.use_async,
        "logs": eplb.log_balancedness,
        "ray copies": os.environ.get(RAY_COPIES, ""),
    }


def main(cases_path: str, out_path: str) -> None:
    cases = json.loads(Path(cases_path).read_text())
    Path(out_path).write_text(json.dumps({name: outcome(case) for name, case in cases.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
