"""The CUDA driver's calls that torch has no function for.

Why not torch's own ways:

- ``torch.multiprocessing`` shares blocks of the caching allocator. Its handle covers the whole
  segment the block lies in, it fails with expandable segments unless a switch was set before the
  first allocation, and it keeps a reference count in a named file of ``/dev/shm`` that stays behind
  when a process is killed. Memory from ``cuMemAlloc`` is a segment of its own and has none of that.
- ``Tensor.copy_`` between GPUs runs on the *source's* current stream, synchronises both, and makes
  a context on the other GPU. ``cuMemcpyAsync`` takes any two addresses and one stream.
- Symmetric memory is allocated by all ranks of a group alike: the evictor would pay for a pool too.

The calling thread must have a CUDA context, as any thread that has used torch on a GPU has.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

_LAZY_PEER_ACCESS = 1
_PORTABLE = 1
_INVALID_VALUE, _NOT_SUPPORTED = 1, 801
Copy = tuple[int, int, int]  # target, source, bytes


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text} ({code})")
        self.code = code


class _IpcHandle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]  # CU_IPC_HANDLE_SIZE, cuda.h


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h; the two hints where operands lie are for managed memory."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BESIDE_COMPUTATION = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE, a hint


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, size, address = ctypes.POINTER, ctypes.c_size_t, ctypes.c_uint64
    signatures: dict[str, tuple[Any, ...]] = {
        "cuInit": (ctypes.c_uint,),
        "cuDeviceGetCount": (pointer(ctypes.c_int),),
        "cuDriverGetVersion": (pointer(ctypes.c_int),),
        "cuDeviceGet": (pointer(ctypes.c_int), ctypes.c_int),
        "cuDeviceGetPCIBusId": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
        "cuGetErrorString": (ctypes.c_int, pointer(ctypes.c_char_p)),
        "cuMemAlloc_v2": (pointer(address), size),
        "cuMemFree_v2": (address,),
        "cuMemHostRegister_v2": (ctypes.c_void_p, size, ctypes.c_uint),
        "cuMemHostUnregister": (ctypes.c_void_p,),
        "cuMemcpyAsync": (address, address, size, ctypes.c_void_p),
        "cuIpcGetMemHandle": (pointer(_IpcHandle), address),
        "cuIpcOpenMemHandle_v2": (pointer(address), _IpcHandle, ctypes.c_uint),
        "cuIpcCloseMemHandle": (address,),
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    for name, arguments in _batch_signatures().items():
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def _batch_signatures() -> dict[str, tuple[Any, ...]]:
    """The batched copy as CUDA 13 has it, and as 12.8 had: with the index of what failed."""
    sizes, addresses = ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_uint64)
    what = (addresses, addresses, sizes, ctypes.c_size_t)
    how = (ctypes.POINTER(_CopyAttributes), sizes, ctypes.c_size_t)
    return {
        "cuMemcpyBatchAsync_v2": (*what, *how, ctypes.c_void_p),
        "cuMemcpyBatchAsync": (*what, *how, sizes, ctypes.c_void_p),
    }


def _call(name: str, *arguments: object) -> None:
    code = getattr(_library(), name)(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(name, code, (text.value or b"unknown error").decode())


def visible_devices() -> tuple[int, int]:
    """How many GPUs the driver shows to this process, and its CUDA version as a number: 12040.

    Raises:
        OSError: there is no driver.
        DriverError: it does not work.
    """
    count, version = ctypes.c_int(), ctypes.c_int()
    _call("cuInit", 0)
    _call("cuDeviceGetCount", ctypes.byref(count))
    _call("cuDriverGetVersion", ctypes.byref(version))
    return count.value, version.value


def pci_address(index: int) -> str:
    """Where the GPU with this number (as torch counts) is on the PCI bus: ``0000:1B:00.0``."""
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDeviceGetPCIBusId", text, len(text), device.value)
    return text.value.decode()


def allocate(size: int) -> int:
    """``size`` bytes on the current device, a segment of their own; returns the address."""
    address = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(address), size)
    return address.value


def free(address: int) -> None:
    """Give back what `allocate` gave; waits for the device."""
    _call("cuMemFree_v2", address)


def share(address: int) -> bytes:
    """A handle by which another process of this node can map what `allocate` gave."""
    handle = _IpcHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle)


def open_shared(handle: bytes) -> int:
    """Map another process's memory for the current device; returns the address here."""
    address = ctypes.c_uint64()
    shared = _IpcHandle.from_buffer_copy(handle)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), shared, _LAZY_PEER_ACCESS)
    return address.value


def close_shared(address: int) -> None:
    """Unmap what `open_shared` mapped."""
    _call("cuIpcCloseMemHandle", address)


def pin(address: int, size: int) -> None:
    """Let copy engines reach host memory, from every context of this process."""
    _call("cuMemHostRegister_v2", address, size, _PORTABLE)


def unpin(address: int) -> None:
    """Undo `pin`."""
    _call("cuMemHostUnregister", address)


def copies_in_one_call() -> str | None:
    """The call that takes many copies at once; None before CUDA 12.8."""
    return next((name for name in _batch_signatures() if hasattr(_library(), name)), None)


def copy_each(copies: Sequence[Copy], stream: int) -> None:
    """Queue copies on ``stream``, between any two of: this GPU, a peer's memory, pinned memory."""
    for target, source, size in copies:
        _call("cuMemcpyAsync", target, source, size, stream)


def copy_all(copies: Sequence[Copy], stream: int) -> bool:
    """As `copy_each`, in one call; in no order among themselves.

    Returns:
        False, and nothing is queued for certain, where the driver does not take them so.
    """
    name = copies_in_one_call()
    if name is None:
        return False
    count = len(copies)
    targets, sources, sizes = zip(*copies, strict=True)
    attributes = _CopyAttributes(_IN_STREAM_ORDER, flags=_BESIDE_COMPUTATION)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t()  # all copies have these attributes
    arguments: list[Any] = [
        (ctypes.c_uint64 * count)(*targets),
        (ctypes.c_uint64 * count)(*sources),
        (ctypes.c_size_t * count)(*sizes),
        *(count, ctypes.byref(attributes), ctypes.byref(first), 1),
    ]
    if name == "cuMemcpyBatchAsync":
        arguments.append(ctypes.byref(failed))
    try:
        _call(name, *arguments, stream)
    except DriverError as error:
        if error.code in (_INVALID_VALUE, _NOT_SUPPORTED):
            return False
        raise
    return True
