"""How activation bytes travel between an evictor and its acceptor."""

from megatron_bpipe.runtime.transport.base import (
    AcceptorEnd,
    PoolRequest,
    TransferHandle,
    Transport,
    TransportError,
)

__all__ = ["AcceptorEnd", "PoolRequest", "TransferHandle", "Transport", "TransportError"]
