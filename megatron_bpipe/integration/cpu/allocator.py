"""Keep freed memory in the process, as CUDA's caching allocator does.

glibc gives the top of its heap back to the kernel when 128 KiB of it are free, and touching it
anew costs far more than any copy (0.3 GiB/s). Stock and BPipe free at different moments, so a
comparison of the two would measure that: 5 to 7 % in the quickstart, which no GPU would show.
"""

import ctypes

# malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
NEVER = -1
LARGEST_MMAP_THRESHOLD = 32 * 2**20
TOP_PAD = 64 * 2**20


def install() -> None:
    """Tell malloc, where the C library has the knobs (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_TOP_PAD, TOP_PAD)
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
