#!/usr/bin/env python3
"""Pretrain a GPT with Megatron when only the megatron-core wheel is installed.

The wheel (0.18 and later) has the training loop, but Megatron-LM's own
``pretrain_gpt.py`` is only in its repository. This script joins the wheel's parts: its
parser (so every flag works), model, datasets, loop. It leaves out packed sequences,
fill-in-the-middle and distillation; for those use Megatron-LM's script.

    torchrun --nproc-per-node 8 scripts/examples/pretrain_gpt.py <Megatron's flags>
"""

import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import argument_utils, get_args, get_timers, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

LEFT_OUT = ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking")
BATCH = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
NOT_BATCH = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def has_mtp(config: Any, vp_stage: int | None) -> bool:
    """Tell whether this stage predicts more tokens than the next."""
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def needs_batch(config: Any, vp_stage: int | None) -> bool:
    """Tell whether this stage reads tokens or labels."""
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def get_batch(data: Iterator[dict[str, Any]], model: Any) -> list[torch.Tensor | None]:
    """Return this rank's part of the next micro-batch, in the order of BATCH."""
    args = get_args()
    config = get_attr_wrapped_model(model, "config")
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    if not needs_batch(config, vp_stage):
        return [None] * len(BATCH)
    batch: dict[str, Any] = dict.fromkeys(BATCH + NOT_BATCH)
    if mpu.get_tensor_model_parallel_rank() == 0:
        loaded = next(data)
        for key in BATCH:
            if loaded.get(key) is not None:
                batch[key] = loaded[key].cuda(non_blocking=True)
    parameters = inspect.signature(get_batch_on_this_tp_rank).parameters
    packed = "has_cu_seqlens" if "has_cu_seqlens" in parameters else "is_sft"
    batch = get_batch_on_this_tp_rank(
        batch,
        **{packed: False},
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp(config, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return [batch[key] for key in BATCH]


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed loss of a micro-batch, its number of tokens, and both to report."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(data: Iterator[dict[str, Any]], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through this stage."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, position_ids, attention_mask = get_batch(data, model)
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def same_name(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments that a part of Megatron takes under the flag's own name."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def build_datasets(samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the training, validation and test set on the ranks that read them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    renamed = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "path_to_cache": args.data_cache_path,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "tokenizer": build_tokenizer(args),
        "blend": blend,
        "blend_per_split": blend_per_split,
    }
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as sequences:
            renamed["sequences_per_dataset"] = json.load(sequences)
    names = [field.name for field in dataclasses.fields(GPTDatasetConfig) if field.init]
    config = GPTDatasetConfig(**same_name(args, names) | renamed)
    model_config = core_transformer_config_from_args(args)

    def is_built_here() -> bool:
        first = mpu.get_tensor_model_parallel_rank() == 0
        return first and needs_batch(model_config, vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0(f"> building {kind.__name__} for training, validation and test")
    return BlendedMegatronDatasetBuilder(kind, samples, is_built_here, config).build()


def build_model(config: Any = None, vp_stage: int | None = None, **stage: Any) -> GPTModel:
    """Build one stage for Megatron 0.18, which has no model configuration for GPT."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.spec is not None:
        spec = import_module(args.spec)
    else:
        te = args.transformer_impl == "transformer_engine"
        spec = get_gpt_decoder_block_spec(config, te, args.normalization, args.qk_l2_norm, vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        **same_name(args, ("fp16_lm_cross_entropy", "position_embedding_type")),
        **same_name(args, ("rotary_percent", "rotary_base")),
        **stage,
    )


def main() -> None:
    """Parse Megatron's flags and train."""
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    for name in LEFT_OUT:
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"{flag} is not in this script: use Megatron-LM's pretrain_gpt.py")
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None  # the wheel has them compiled, and no Makefile
    build_datasets.is_distributed = True  # every rank builds, the builder picks who reads
    how: dict[str, Any] = {}
    if hasattr(argument_utils, "gpt_config_from_args"):
        model_config = argument_utils.gpt_config_from_args(args)
        container = argument_utils.pretrain_cfg_container_from_args(args, model_config)
    else:
        container = argument_utils.pretrain_cfg_container_from_args(args)
        how["model_provider"] = build_model
    pretrain(
        cfg_container=container,
        train_valid_test_dataset_provider=build_datasets,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **how,
    )


if __name__ == "__main__":
    main()
