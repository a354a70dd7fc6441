"""Builds a balancer for one rank: groups, transport, worker and all. The one call an adaptor makes."""

from __future__ import annotations

import functools
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

from swiftbalancer import wire
from swiftbalancer.balancer import Balancer, Parts
from swiftbalancer.board import Board, open_board
from swiftbalancer.border import GroupInfo, MapSink, ModelBinding
from swiftbalancer.config import Config, to_dict
from swiftbalancer.cycle import LEADER, VOTE_SIZE, Event
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import DispatchForm, DispatchKind
from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.gathering import LoadBoard, open_load_board
from swiftbalancer.groups import Group, GroupFactory
from swiftbalancer.interpreter_lock import favour_this_thread
from swiftbalancer.leader import Leader, RequestForm
from swiftbalancer.link import WorkerLink
from swiftbalancer.monitor import Monitor
from swiftbalancer.pacer import Pacer
from swiftbalancer.recorder import LoadRecorder
from swiftbalancer.stats import Stats
from swiftbalancer.steptimes import StepTimes
from swiftbalancer.throttle import Throttle
from swiftbalancer.transport import ExpertWeights, TransferLimits, Workplace, choose
from swiftbalancer.transport.staging import Staging, entry_stride

NARROWER = {"table": ("table", "static", "uniform"), "static": ("static", "uniform"), "uniform": ("uniform",)}
"""Which forms an engine that can do the first can be told to use."""
UNDO_S = 5.0
"""For each part to end, where attaching fails."""


def attach(config: Config, binding: ModelBinding, group: GroupInfo) -> Balancer:
    """A running balancer. Collective: every rank of the group calls it between the same two forward passes.

    Blocks until all ranks are connected. Raises `ConfigError` for settings that do not fit the engine,
    `TransferFailed` if ranks cannot reach each other, `UnsupportedEngine` for weights of a layout we cannot move.
    """
    favour_this_thread()
    with ExitStack() as undo:
        balancer = _attach(config, binding, group, undo)
        undo.pop_all()
    return balancer


def _attach(config: Config, binding: ModelBinding, group: GroupInfo, undo: ExitStack) -> Balancer:
    """`undo` gets what ends all that was begun: a rank that fails must look gone to its peers."""
    binding = replace(binding, dispatch=_dispatch(config, binding))
    deadline_s = config.agreement.deadline_s
    layer = DeviceLayer.for_device(group.device)
    weights = ExpertWeights(binding.weights, slots_per_rank=binding.placement.topology.slots_per_rank)
    expert_bytes = max(weights.payload_bytes(i) for i in range(weights.num_layers))
    hello = _hello(config, binding, expert_bytes)
    link = None
    if group.rank == LEADER and config.mode != "off":  # before peers are met: its endpoint or keys may be wrong
        link = WorkerLink(hello, config.worker)
        undo.callback(link.close, UNDO_S)
    factory = GroupFactory(group.store, rank=group.rank, size=group.size, prefix=group.prefix)
    undo.callback(factory.close)
    try:
        votes = factory.create("votes", timeout_s=deadline_s)
        undo.callback(votes.close)
        bulk = factory.create("bulk", timeout_s=deadline_s)
        undo.callback(bulk.close)
        board, load_board = _boards(config, binding, factory, votes, undo)
    except RuntimeError as error:
        raise TransferFailed(f"rank {group.rank}: peers did not connect within {deadline_s} s: {error}") from None
    limits = _limits(config, binding, weights)
    staging_experts = Staging.num_entries(weights, limits.staging_bytes)
    if config.mode != "on":  # nothing will ever move
        limits = replace(limits, staging_bytes=entry_stride(weights))
    recorder = LoadRecorder(layer, binding.counters, binding.passes, load_board)
    undo.callback(recorder.close)
    stats, bound = Stats(), config.transport.max_step_inflation
    times = StepTimes(stats, Pacer(bound), Throttle(bound))
    committed = layer.event()
    beside = beside_commit(recorder, binding.maps, functools.partial(layer.record, committed))
    inbox: deque[Event | None] = deque()
    nudge = functools.partial(inbox.append, None)
    place = Workplace(
        weights,
        layer,
        factory,
        limits,
        beside_commit=beside,
        rest=times.rest,
        adapt=times.adapt,
        is_dear=lambda: times.throttle.is_dear,
        nudge=nudge,
    )
    transport = choose(config.transport.kind, place, votes, one_node=binding.placement.topology.num_nodes == 1)
    undo.callback(transport.close, UNDO_S)
    form = RequestForm(dispatch=binding.dispatch, staging_experts=staging_experts)
    leader = Leader(config, link, form, stats) if link is not None else None
    parts = Parts(
        rank=group.rank,
        layer=layer,
        committed=committed,
        votes=votes,
        board=board,
        load_board=load_board,
        bulk=bulk,
        recorder=recorder,
        transport=transport,
        expert_bytes=expert_bytes,
        leader=leader,
        groups=factory,
        times=times,
        inbox=inbox,
    )
    balancer = Balancer(config, binding, parts, stats)
    undo.pop_all()
    undo.callback(balancer.close)
    if link is not None:
        balancer.monitor = Monitor(balancer, link, hello=hello, config=config.metrics)
    return balancer


def _boards(
    config: Config, binding: ModelBinding, factory: GroupFactory, votes: Group, undo: ExitStack
) -> tuple[Board | None, LoadBoard | None]:
    """For votes and loads of ranks that share memory, unless the configuration wants them gathered."""
    if config.agreement.channel == "gloo" or config.mode == "off" or binding.placement.topology.num_nodes > 1:
        return None, None
    all_agree = functools.partial(votes.all_agree, deadline_s=votes.timeout_s)
    rank, size = votes.rank, votes.size
    board = None
    if config.mode == "on":
        board = open_board(factory.store("board"), all_agree, rank=rank, size=size, width=VOTE_SIZE)
    if board is not None:
        undo.callback(board.close)
    width = binding.counters.numel() + 2  # see `Snapshot.host`
    load_board = open_load_board(factory.store("loads"), all_agree, rank=rank, size=size, width=width)
    if load_board is not None:
        undo.callback(load_board.close)
    return board, load_board


def _dispatch(config: Config, binding: ModelBinding) -> DispatchForm:
    """The form asked for, if the engine can do it."""
    able = binding.dispatch
    if config.dispatch.form in ("auto", able.kind):
        return able
    asked = cast(DispatchKind, config.dispatch.form)
    if asked not in NARROWER.get(able.kind, ()):
        raise ConfigError(f"dispatch.form: {asked!r}, but this engine can only do {able.kind!r}")
    width = binding.placement.topology.num_ranks if asked == "static" else able.width
    return DispatchForm(kind=asked, width=width)


def beside_commit(recorder: LoadRecorder, maps: MapSink, mark: Callable[[], None]) -> Callable[[], None]:
    """What a commit of weights launches besides: where the device records launches, all of it is one call.

    `mark` records the commit's end, for now: maps that must be written by another call come later.
    """
    write_maps = maps.launches

    def beside() -> None:
        recorder.forget()
        if write_maps is not None:
            write_maps()
        mark()

    return beside


def _limits(config: Config, binding: ModelBinding, weights: ExpertWeights) -> TransferLimits:
    """Staging memory as configured, but no more than a plan could ever use, and at least one expert."""
    topology = binding.placement.topology
    per_layer = topology.slots_per_rank
    if config.policy.name == "swift":
        per_layer = min(per_layer, max(config.policy.max_moves_per_layer, 1))
    stride = entry_stride(weights)
    useful = per_layer * binding.placement.num_layers * stride
    staging_bytes = max(min(config.transport.staging_mib << 20, useful), stride)
    return TransferLimits(
        staging_bytes=staging_bytes,
        deadline_s=config.transport.deadline_s,
        verify=config.transport.verify,
        max_ctas=config.transport.max_ctas,
    )


def _hello(config: Config, binding: ModelBinding, expert_bytes: int) -> wire.Hello:
    """Without the secret key, which is nobody else's."""
    values = to_dict(config)
    values["worker"] |= {"client_secret_key": None}
    return wire.Hello(
        engine=f"{binding.name}@{socket.gethostname()}/{os.getpid()}",
        model=wire.ModelSpec(
            name=binding.name,
            num_layers=binding.placement.num_layers,
            num_experts=binding.placement.num_experts,
            top_k=binding.top_k,
            expert_bytes=expert_bytes,
        ),
        topology=binding.placement.topology,
        config=values,
    )
