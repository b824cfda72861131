"""How activation bytes travel between an evictor and its acceptor."""

from .base import Lender, Ticket, Transport, TransportError

__all__ = ["Lender", "Ticket", "Transport", "TransportError"]
