"""Will the link be too slow? Said before the first eviction, before anything could be measured.

Bytes of one micro-batch over the link's bandwidth, against one forward's time. The bandwidth is
the published one of that kind of link (or what ``--bpipe-measure-links`` measured), the forward's
time its FLOPs at half of the GPU's peak, as published runs reach (arXiv 2401.02088, table 3: 34
to 52 % MFU). On a device without published figures nothing is said. What is measured after the
second iteration (`runtime/observe/link_watch.py`) is the better judgement.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import Gpu, recognised
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.time.flops import layer_flops
from megatron_bpipe.runtime.observe.link_watch import too_slow
from megatron_bpipe.runtime.transport.pair.bandwidth import Speed
from megatron_bpipe.runtime.transport.pair.catalogue import Route, spec_named
from megatron_bpipe.runtime.transport.pair.links import Link

SHARE_OF_PEAK = 0.5


def gpu_here() -> Gpu | None:
    """Published figures of the device at hand, if there are any."""
    return recognised(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def forward_flops(config: Any, seq: int, sequences: int, groups: Any, stages: int) -> float | None:
    """FLOPs of one micro-batch's forward on one rank of an average stage.

    Args:
        config: Megatron's TransformerConfig.
        seq: tokens of a sequence.
        sequences: of a micro-batch.
        groups: Megatron's process groups, for the tensor- and context-parallel sizes.
        stages: of the pipeline.

    Returns:
        None for a model whose FLOPs the estimator does not know.
    """
    experts = getattr(config, "num_moe_experts", None) or 0
    try:
        model = Model(
            name="run",
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_query_groups or config.num_attention_heads,
            layers=config.num_layers,
            seq=seq,
            vocab=1,  # the output layer is not on an evictor
            ffn=config.moe_ffn_hidden_size if experts else config.ffn_hidden_size,
            gated=config.gated_linear_unit,
            norm="layernorm",
            bias=False,
            tied_embeddings=True,
            learned_positions=False,
            dropout=False,
            experts=experts,
            experts_per_token=config.moe_router_topk if experts else 1,
        )
    except EstimateError:
        return None
    ranks = groups.tp.size() * groups.cp.size()
    return layer_flops(model, sequences) / 3 * model.layers / stages / ranks


def bandwidth(transport: str, link: Link | None, gpu: Gpu) -> float:
    """Published bytes/s of a transport over a link, one direction.

    Raises:
        TransportError: there is no transport of this name.
    """
    return {
        Route.GPU_MEMORY: gpu.memory_bandwidth / 2,  # each byte is read and written
        Route.NVLINK: gpu.nvlink,
        Route.HOST_LINK: gpu.host,
        Route.NETWORK: gpu.network,
    }[spec_named(transport).route(link)]


def forecast(
    transport: str, link: Link | None, size: int, flops: float | None, measured: Speed | None
) -> str | None:
    """The warning of a link that will probably be too slow; None if it will not, or nobody knows.

    Args:
        transport: that the pair has agreed on.
        link: between its ranks.
        size: bytes of one micro-batch.
        flops: of its forward, from `forward_flops`.
        measured: the link's speed, if it was measured.
    """
    gpu = gpu_here()
    if gpu is None or flops is None:
        return None
    speed = min(measured.out, measured.back) if measured else bandwidth(transport, link, gpu)
    said = too_slow(size, size / speed, flops / (SHARE_OF_PEAK * gpu.flops))
    if said is None:
        return None
    source = "measured bandwidth" if measured else "published bandwidth"
    return f"expected before training ({source}, {gpu.name} at {SHARE_OF_PEAK:.0%} MFU): {said}"
