"""A middle stage and the output layer of a model, built by Megatron as its training loop does."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.training.arguments import core_transformer_config_from_args

from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.integration.profile.attention import SDPACoreAttention
from megatron_bpipe.integration.profile.model import Share


@dataclass
class Part:
    """Something to run forward and backward.

    Attributes:
        share: what it is a part of.
        ddp: Megatron's wrapper: its hooks add every gradient into ``main_grad`` and drop it, as
            between the micro-batches of a training step.
        gpt_model: the GPTModel inside it.
        head: it is the output layer, not the layers.
    """

    share: Share
    ddp: Any
    gpt_model: Any
    head: bool

    def new_input(self, micro_batch: int) -> torch.Tensor:
        """What the stage before would send."""
        share = self.share
        residual_in_fp32 = getattr(share.args, "fp32_residual_connection", False)
        return torch.randn(
            (share.local_tokens, micro_batch, share.model.hidden),
            dtype=torch.float32 if residual_in_fp32 else share.dtype,
            device=torch.cuda.current_device(),
            requires_grad=True,
        )

    def new_labels(self, micro_batch: int) -> torch.Tensor | None:
        """Labels for the loss; None for layers."""
        if not self.head:
            return None
        shape = (micro_batch, self.share.model.seq)
        device = torch.cuda.current_device()
        return torch.randint(0, self.share.model.vocab, shape, device=device)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The stage's output [s, b, h], or the mean loss."""
        self.gpt_model.set_input_tensor(hidden)
        # the attention mask is None on every stage but the first and last: layers make the causal
        output: torch.Tensor = self.gpt_model(None, None, None, labels=labels)
        return output.float().mean() if self.head else output

    def forget(self) -> None:
        """Drop the input and all gradients, also those an error left half done."""
        self.gpt_model.set_input_tensor(None)
        for parameter in self.gpt_model.parameters():
            parameter.grad = None
        self.ddp.zero_grad_buffer()

    def close(self) -> None:
        """Free all it holds; it cannot be used any more.

        Megatron's hooks tie modules into cycles that run through autograd's nodes, where Python's
        collector does not see them, and after an error layers still hold what they worked on.
        """
        for module in list(self.ddp.modules()):
            vars(module).clear()
        parallel_state.get_global_memory_buffer().buffer.clear()

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients are reduced after the last micro-batch only: not what is measured here."""
        context: AbstractContextManager[None] = self.ddp.no_sync()
        return context


def build_layers(share: Share, attention: Attention) -> Part:
    """The share's layers, with nothing before or after; raises what Megatron raises."""
    return _part(share, share.layers, attention, head=False)


def build_head(share: Share) -> Part:
    """Final norm, output layer and loss, without a layer; raises what Megatron raises."""
    return _part(share, 1, "none", head=True)


def how_flash(args: Any) -> str:
    """Which implementation "flash" is, in words."""
    if args.transformer_impl == "transformer_engine":
        return "Transformer Engine with --attention-backend flash"
    return "torch's scaled_dot_product_attention (flash kernels only) in Megatron's own layers"


def _part(share: Share, layers: int, attention: Attention, head: bool) -> Part:
    args = share.alone(layers, attention)
    engine = args.transformer_impl == "transformer_engine"
    if engine:
        args.attention_backend = AttnBackend.flash if attention == "flash" else AttnBackend.unfused
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name, None)  # Megatron sets them for each model, and refuses to change
    config = core_transformer_config_from_args(args)
    block_spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=engine,
        normalization=args.normalization,
        qk_l2_norm=args.qk_l2_norm,
    )
    if attention == "flash" and not engine:
        for layer in block_spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    gpt_model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec,
        vocab_size=share.vocab,
        max_sequence_length=args.max_position_embeddings,
        pre_process=False,
        post_process=head,
        # the weight is as large when it is tied, but then another stage has to exist
        share_embeddings_and_output_weights=False,
        **_from_flags(args),
    )
    if head:
        gpt_model.decoder.layers = torch.nn.ModuleList()
    gpt_model.cuda(torch.cuda.current_device())
    wrapped = Float16Module(config, gpt_model) if args.fp16 or args.bf16 else gpt_model
    in_fp32 = args.accumulate_allreduce_grads_in_fp32
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32)
    ddp = DistributedDataParallel(config=config, ddp_config=ddp_config, module=wrapped)
    return Part(share, ddp, gpt_model, head)


def _from_flags(args: Any) -> dict[str, Any]:
    """GPTModel's parameters that have a flag, as far as this release has the flag."""
    flags = {
        "fp16_lm_cross_entropy": "fp16_lm_cross_entropy",
        "position_embedding_type": "position_embedding_type",
        "rotary_percent": "rotary_percent",
        "rotary_base": "rotary_base",
        "rope_scaling": "use_rope_scaling",
        "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    }
    return {name: getattr(args, flag) for name, flag in flags.items() if hasattr(args, flag)}
