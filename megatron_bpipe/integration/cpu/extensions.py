"""CUDA extensions are not built.

Megatron 0.15 builds one when it is imported wherever there is a compiler (``nvcc``), and takes a
RuntimeError for there being no GPU; without one torch would ask the stand-in's capability which
architecture to build for, and raise something else.
"""

import functools
from typing import Any

from megatron_bpipe.integration.patches.import_hook import after_import

CPP_EXTENSION = "torch.utils.cpp_extension"


def install() -> None:
    """Refuse as torch does where it finds no CUDA."""
    after_import(CPP_EXTENSION, _without_cuda)


def _without_cuda(cpp_extension: Any) -> None:
    stock = cpp_extension.load_inline

    @functools.wraps(stock)
    def load_inline(*positional: Any, **named: Any) -> Any:
        if named.get("with_cuda") or named.get("cuda_sources"):
            raise RuntimeError("CUDA extensions are not built: the CPU stands in for CUDA here")
        return stock(*positional, **named)

    cpp_extension.load_inline = load_inline
