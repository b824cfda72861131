"""GPUs that torch cannot use: then training must not start on the CPU as if there were none."""

from __future__ import annotations

import torch

from megatron_bpipe.runtime.transport.cuda import driver


def why_unusable() -> str | None:
    """What keeps this torch from the GPUs of this machine; None if it can use them or has none.

    A torch that was built without CUDA is taken for a wish to use the CPU.
    """
    if torch.cuda.is_available() or torch.version.cuda is None:
        return None
    try:
        count, version = driver.visible_devices()
    except (OSError, driver.DriverError):
        return None
    if not count:
        return None
    return (
        f"the driver shows {count} GPU(s), but torch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda}, cannot use them: the driver's CUDA is {version // 1000}."
        f"{version % 1000 // 10}. Install a torch for that version or a newer driver; to train on "
        "the CPU hide the GPUs with CUDA_VISIBLE_DEVICES= (empty)"
    )
