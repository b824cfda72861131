"""The process groups of rank 0 among t tensor-parallel ranks, of which the others are not there.

torch's "fake" backend, which Megatron uses for its own --fake-process-group, answers every
collective at once from this rank's own data. So Megatron itself cuts heads, FFN, vocabulary and,
with sequence parallelism, the sequence; sizes, kernels and bytes are one rank's, messages cost
nothing (gathering copies inside this rank's memory), and the numbers computed mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_bpipe.integration.profile.settings import ProfileError


@contextmanager
def one_rank_of(args: Any) -> Iterator[None]:
    """Be rank 0 of ``args.tensor_model_parallel_size`` inside the block.

    Raises:
        ProfileError: this torch has no such backend, or the sizes of the groups do not fit.
    """
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ProfileError(f"this torch ({torch.__version__}) has no fake process group") from error
    tp, experts_tp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    if tp % experts_tp:
        raise ProfileError(
            f"--expert-tensor-parallel-size {experts_tp} does not divide "
            f"--tensor-model-parallel-size {tp}: profile with a size that does"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            expert_tensor_parallel_size=experts_tp,
            create_gloo_process_groups=False,
        )
        torch.manual_seed(args.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
