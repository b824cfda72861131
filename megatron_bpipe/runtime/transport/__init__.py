"""How activation bytes travel between an evictor and its acceptor."""

from megatron_bpipe.runtime.transport.base import Lender, Ticket, Transport, TransportError

__all__ = ["Lender", "Ticket", "Transport", "TransportError"]
