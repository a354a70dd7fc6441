"""The device layer: the only package that names a vendor, beside the names in `swiftbalancer.vendors`."""

from swiftbalancer.device.accelerator import AcceleratorLayer
from swiftbalancer.device.collective import Collective, Gloo, Membership, PeerOp
from swiftbalancer.device.host import HostLayer
from swiftbalancer.device.known import best_layer
from swiftbalancer.device.layer import DeviceLayer, Event, Stream
from swiftbalancer.device.peer_memory import PeerMemory

__all__ = [
    "AcceleratorLayer",
    "Collective",
    "DeviceLayer",
    "Event",
    "Gloo",
    "HostLayer",
    "Membership",
    "PeerMemory",
    "PeerOp",
    "Stream",
    "best_layer",
]
