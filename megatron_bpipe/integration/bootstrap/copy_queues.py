"""Hardware queues of their own for copies, beside the one queue that Megatron asks for.

Megatron demands ``CUDA_DEVICE_MAX_CONNECTIONS=1`` with tensor or context parallelism, so that
kernels start in the order in which they were launched. That variable also sets the number of copy
queues, and a copy in the same queue as the kernels can hold them up and be held up.
``CUDA_DEVICE_MAX_COPY_CONNECTIONS`` overrides it for copies alone, on GPUs of compute capability
8.0 and above (CUDA C++ Programming Guide, "CUDA Environment Variables"). 8 is what CUDA takes where
neither is set. The order of kernels is not touched.
"""

import os

COMPUTE = "CUDA_DEVICE_MAX_CONNECTIONS"
COPY = "CUDA_DEVICE_MAX_COPY_CONNECTIONS"
QUEUES = "8"


def ask_for_copy_queues() -> None:
    """Set it where Megatron's variable is 1 and nobody has; CUDA reads both when it starts."""
    if os.environ.get(COMPUTE) == "1":
        os.environ.setdefault(COPY, QUEUES)
