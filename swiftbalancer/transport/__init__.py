"""Moving expert weights between ranks: one `Transport`, several ways to carry the bytes."""

from swiftbalancer.transport.batch_run import Workplace
from swiftbalancer.transport.candidates import choose
from swiftbalancer.transport.experts import ExpertWeights
from swiftbalancer.transport.mover import UNPACED, Transport
from swiftbalancer.transport.seam import (
    AT_WORK,
    WAITING,
    Lately,
    TransferBatch,
    TransferLimits,
    TransferState,
    TransferStatus,
)
from swiftbalancer.transport.staging import CommitCopies

__all__ = [
    "AT_WORK",
    "UNPACED",
    "WAITING",
    "CommitCopies",
    "ExpertWeights",
    "Lately",
    "TransferBatch",
    "TransferLimits",
    "TransferState",
    "TransferStatus",
    "Transport",
    "Workplace",
    "choose",
]
