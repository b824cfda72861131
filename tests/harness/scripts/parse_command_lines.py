"""Command lines through Megatron's own parser, its checks, and this package's."""

import contextlib
import io
import json
import os
import sys
from typing import Any

import megatron.training.arguments as arguments
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.enums import AttnBackend

import megatron_bpipe


def parsed(argv: list[str], world: int) -> Any:
    """Megatron's arguments for rank 0 of a job of ``world`` ranks, eight a node."""
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(min(world, 8)),
    )
    os.environ.pop("BPIPE_PHYSICAL_RANK", None)
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    while "=" in argv[0] and not argv[0].startswith("-"):  # variables before the flags
        name, value = argv[0].split("=")
        os.environ[name], argv = value, argv[1:]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # a Hopper GPU
    sys.argv = ["pretrain_gpt.py", *argv]
    megatron_bpipe.install()
    try:
        args = arguments.parse_args()  # unknown flags end it
        with contextlib.redirect_stdout(io.StringIO()):
            return arguments.validate_args(args)
    finally:
        megatron_bpipe.uninstall()


def parameters(args: Any) -> int:
    """Of the model that Megatron builds from these arguments on one rank, on the meta device."""
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = 1
    args.expert_model_parallel_size = args.expert_tensor_parallel_size = 1
    args.virtual_pipeline_model_parallel_size = args.pipeline_model_parallel_layout = None
    args.sequence_parallel, args.use_cpu_initialization = False, True
    args.moe_grouped_gemm, args.transformer_impl = False, "local"
    args.gradient_accumulation_fusion, args.perform_initialization = False, False
    config = arguments.core_transformer_config_from_args(args)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization
    )
    ahead = None
    if args.mtp_num_layers:
        ahead = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    with torch.device("meta"):
        model = GPTModel(
            config,
            block,
            vocab_size=args.vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type="rope" if args.position_embedding_type != "learned_absolute"
            else "learned_absolute",
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            mtp_block_spec=ahead,
        )  # fmt: skip
    return sum(parameter.numel() for parameter in model.parameters())


def alone() -> None:
    """Groups of one rank, as building needs them."""
    if not parallel_state.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


for line in json.loads(sys.argv[1]):
    args = parsed(line["argv"], line["gpus"])
    expected = line["expected"]
    for name, value in expected.items():
        found = getattr(args, name)
        found = found.name if isinstance(found, AttnBackend) else found
        assert found == value, (line, name, found)
    if line.get("parameters"):
        alone()
        counted = parameters(args)
        assert abs(line["parameters"] / counted - 1) < 1e-3, (line, counted)
