"""Memory-balanced pipeline parallelism (BPipe) for Megatron-LM.

import megatron_bpipe
megatron_bpipe.install()      # before Megatron parses its arguments; then pass --bpipe
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_bpipe.integration.options import Options

__version__ = "0.1.0"
__all__ = ["Options", "install", "status", "uninstall", "write_report"]


def __getattr__(name: str) -> Any:
    """Load the integration only when asked: the pure layers need neither torch nor Megatron."""
    if name == "Options":
        from megatron_bpipe.integration.options import Options

        return Options
    if name in __all__:
        from megatron_bpipe.integration import install

        return getattr(install, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
