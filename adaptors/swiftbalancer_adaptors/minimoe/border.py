"""minimoe as the balancer sees it."""

from __future__ import annotations

from swiftbalancer.border import ModelBinding
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.maps import TableMaps
from swiftbalancer_adaptors.minimoe.engine import MiniMoeEngine


def bind(engine: MiniMoeEngine) -> ModelBinding:
    """The binding of an engine; the engine keeps all tensors."""
    layer = DeviceLayer.for_device(engine.device)
    return ModelBinding(
        name=f"minimoe-{engine.spec.preset}",
        placement=engine.placement,
        top_k=engine.top_k,
        weights=[engine.expert_tensors(number) for number in range(engine.config.num_layers)],
        counters=engine.counters,
        counts="local",
        maps=TableMaps(layer, engine.dispatch_table, engine.physical_to_logical_map),
        dispatch=DispatchForm("table", engine.spec.table_width),
        per_rank_dispatch=True,
        passes=engine.passes,
    )
