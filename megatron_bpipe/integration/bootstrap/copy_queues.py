"""The hardware queues that Megatron asks for, and others for copies; before CUDA starts.

Up to Hopper Megatron demands ``CUDA_DEVICE_MAX_CONNECTIONS=1`` with tensor or context parallelism,
so that kernels start in the order in which they were launched. That variable also sets the number
of copy queues, and a copy in the same queue as the kernels can hold them up and be held up.
``CUDA_DEVICE_MAX_COPY_CONNECTIONS`` overrides it for copies alone, on GPUs of compute capability
8.0 and above (CUDA C++ Programming Guide, "CUDA Environment Variables"). 8 is what CUDA takes where
neither is set. The order of kernels is not touched.
"""

import itertools
import os
import re
from collections.abc import Sequence

COMPUTE = "CUDA_DEVICE_MAX_CONNECTIONS"
COPY = "CUDA_DEVICE_MAX_COPY_CONNECTIONS"
QUEUES = "8"
_ONE_QUEUE = re.compile(r"--(?:tensor-model|context)-parallel-size")


def ask_for_one_queue(argv: Sequence[str]) -> str | None:
    """Set Megatron's variable to 1 where the flags need it and nobody has set it.

    Returns:
        What to tell the user, None where nothing was set.
    """
    if COMPUTE in os.environ or any(word.endswith("fsdp") or "fsdp2" in word for word in argv):
        return None
    for word, value in itertools.pairwise([*argv, ""]):
        flag, _, given = word.partition("=")
        if _ONE_QUEUE.fullmatch(flag) and (given or value) not in ("", "1"):
            os.environ[COMPUTE] = "1"
            return (
                f"{COMPUTE}=1 set, as Megatron asks with {flag} {given or value} up to Hopper; "
                "export another value to keep it"
            )
    return None


def ask_for_copy_queues() -> None:
    """Set it where Megatron's variable is 1 and nobody has; CUDA reads both when it starts."""
    if os.environ.get(COMPUTE) == "1":
        os.environ.setdefault(COPY, QUEUES)
