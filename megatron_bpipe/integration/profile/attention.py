"""Flash attention for Megatron's own layers, without Transformer Engine or flash-attn.

torch's scaled_dot_product_attention has kernels that never write the s x s matrix down, on CUDA and
on the CPU. It falls back to one that does without a word; here that is an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention import SDPBackend, sdpa_kernel

# those that keep no s x s matrix; which of them takes the call depends on device and dtype
FLASH = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


class NoFlashKernelError(RuntimeError):
    """torch has no flash kernel for this attention; says for which, and what to change."""


class SDPACoreAttention(MegatronModule):
    """Causal self-attention by torch's SDPA, in the place of Megatron's core attention.

    Megatron scales the scores by 1/sqrt(d) and, with query-key layer scaling, by 1/layer before
    and by the layer after: the same in exact arithmetic, so one scale will do.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"causal self-attention only, not {attn_mask_type}, {attention_type}")
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object = None,
    ) -> torch.Tensor:
        """Context [s, b, heads x d] of queries [s, b, heads, d] and keys, values [s, b, groups, d].

        Raises:
            ValueError: a mask other than the causal one, a bias, or packed sequences are given.
            NoFlashKernelError: no flash kernel of torch takes the call.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params:
            raise ValueError("causal attention over whole sequences only: no mask, bias or packing")
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # as Megatron: the ranks of a tensor-parallel group draw their dropout apart
        with sdpa_kernel(FLASH), tensor_parallel.get_cuda_rng_tracker().fork():
            try:
                context = torch.nn.functional.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    dropout_p=dropout,
                    is_causal=True,
                    scale=self.scale,
                    enable_gqa=k.size(1) != q.size(1),
                )
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                kind = str(query.dtype).removeprefix("torch.")
                raise NoFlashKernelError(
                    f"no flash kernel: torch has none on {query.device.type} for {kind}, heads of "
                    f"{query.size(3)}, attention dropout {dropout}: try --attention-dropout 0"
                ) from error
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
