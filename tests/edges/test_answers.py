"""What the worker makes of a plan request before it plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from swiftbalancer.config import from_dict
from swiftbalancer.wire import Measured
from swiftbalancer_worker.answers import plan_input
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.inputs import PlanInput
from tests.edges.engines import SUB_WINDOWS, TOPOLOGY, hello, plan_request

STEP_S = 0.01


def asked(**policy: Any) -> PlanInput:
    request, arrays = plan_request(1)
    request = msgspec.structs.replace(request, measured=Measured(seconds_per_step=STEP_S))
    section = {"name": "swift", **policy}
    return plan_input(hello(policy=section), from_dict({"policy": section}), request, arrays)


@pytest.mark.parametrize("reads", [0.0, 200.0])
def test_a_measured_step_is_put_down_to_tokens_and_reads(reads: float) -> None:
    given = asked(tokens_per_activation=reads)
    assert given.cost.tokens_per_activation == reads
    work = given.cost.worth(given.loads).sum() / (SUB_WINDOWS * given.cost.steps_per_sub_window * TOPOLOGY.num_ranks)
    assert given.cost.seconds_per_token * work == pytest.approx(STEP_S)


def test_tokens_alone_make_the_step_where_reads_do_not_count() -> None:
    given = asked()
    per_rank_step = given.loads.sum() / (SUB_WINDOWS * 32 * TOPOLOGY.num_ranks)
    assert given.cost.seconds_per_token == pytest.approx(STEP_S / per_rank_step)


def test_a_replica_is_read_at_most_once_a_step() -> None:
    cost = CostModel(tokens_per_activation=100.0, steps_per_sub_window=32.0)
    tokens = np.array([0.0, 1e-6, 32.0, 1e6])
    np.testing.assert_allclose(cost.worth(tokens) - tokens, [0.0, 1e-4, 3200 * (1 - np.exp(-1)), 3200.0], rtol=1e-4)
    assert replace(cost, tokens_per_activation=0.0).worth(tokens) is tokens
