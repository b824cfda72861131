"""Megatron's compiled dataset helpers: use those that are there.

``initialize_megatron`` runs ``make`` in ``megatron/core/datasets`` on rank 0
(``training/initialize.py``, ``_compile_dependencies``). The wheel has the compiled
extension but no Makefile, so there the call ends the job, GPU or not. A checkout has
the Makefile, but often no pybind11 or compiler beside it, and then ends the job with
a compiler's message. Neither is necessary where a compiled extension of the same
source exists.
"""

import importlib.machinery
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_bpipe.integration.checks.hook_points import DATASET_EXTENSION, DATASET_UTILS
from megatron_bpipe.integration.patches.import_hook import after_import


def install() -> None:
    """Skip the compilation where it is not needed, explain where it cannot run."""
    after_import(DATASET_UTILS, _patch)


def compiled_helpers(folder: Path) -> Path | None:
    """Return the compiled extension for ``folder`` (a ``megatron/core/datasets``).

    That is its own, or that of another Megatron on the path, such as the wheel that a
    checkout shadows, if both have the same ``helpers.cpp``.
    """
    own = _extension_in(folder)
    if own is not None:
        return own
    source = _source_in(folder)
    for entry in sys.path:
        other = Path(entry or ".") / "megatron" / "core" / "datasets"
        extension = _extension_in(other)
        if extension is not None and source is not None and _source_in(other) == source:
            return extension
    return None


def missing_build_tools() -> list[str]:
    """Return what this machine lacks to compile the helpers of a checkout."""
    missing = []
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if shutil.which("make") is None:
        missing.append("make")
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        missing.append("a C++ compiler")
    return missing


def _extension_in(folder: Path) -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        extension = folder / f"helpers_cpp{suffix}"
        if extension.is_file():
            return extension
    return None


def _source_in(folder: Path) -> bytes | None:
    source = folder / "helpers.cpp"
    return source.read_bytes() if source.is_file() else None


def _patch(dataset_utils: Any) -> None:
    """Put this release's helpers in place on every rank, or guard their compilation."""
    folder = Path(dataset_utils.__file__).parent
    extension = compiled_helpers(folder)
    if extension is not None:
        if extension.parent != folder:
            _load(extension)
        dataset_utils.compile_helpers = lambda: None
        return
    stock = dataset_utils.compile_helpers

    def compile_helpers() -> None:
        """Compile the helpers, or say what is missing for that."""
        missing = missing_build_tools()
        if missing:
            raise RuntimeError(
                f"Megatron's dataset helpers are not compiled (no helpers_cpp in {folder}) and "
                f"cannot be compiled here: {', '.join(missing)} missing. Install that, or the "
                "megatron-core wheel of the same release, which has them compiled."
            )
        stock()
        if _extension_in(folder) is None:
            raise RuntimeError(
                f"make in {folder} compiled the dataset helpers for another Python than this "
                f"one ({sys.executable}): it takes python3 and python3-config from the PATH. "
                f"Put those of Python {sys.version_info[0]}.{sys.version_info[1]} first there."
            )

    dataset_utils.compile_helpers = compile_helpers


def _load(extension: Path) -> None:
    """Import an extension of another folder under the name that Megatron uses."""
    loader = importlib.machinery.ExtensionFileLoader(DATASET_EXTENSION, str(extension))
    spec = importlib.machinery.ModuleSpec(DATASET_EXTENSION, loader, origin=str(extension))
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[DATASET_EXTENSION] = module
