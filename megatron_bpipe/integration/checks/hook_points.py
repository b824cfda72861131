"""Every symbol of Megatron that this package replaces, wraps, calls or reads: a table.

`probe.py` asks a Megatron at hand for all of it. ``tests/conventions/test_hook_points.py`` reads
this package's source and fails for a symbol that is used and not listed, or listed and not used.

Most symbols are the same in every supported release. Where one came or went, the table says with
which release; this was read in Megatron-LM's history at core_v0.14.0, core_v0.15.3, core_v0.16.1,
core_v0.17.1, core_v0.18.2, core_v0.19.0 and main of 2026-08-22.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Minor releases that scripts/version_matrix.py has run (docs/results/versions.md). Only releases:
# main has the number of a release to come, which is not known before it was run.
KNOWN_RELEASES = ("0.14", "0.15", "0.16", "0.17", "0.18", "0.19")

Feature = Literal["schedule", "training", "v_placement", "both_ways", "cpu", "profile"]

PACKAGE_INFO = "megatron.core.package_info"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"
PARALLEL_STATE = "megatron.core.parallel_state"
GROUPS = "megatron.core.process_groups_config"
CONFIG = "megatron.core.transformer.transformer_config"
LAYOUT = "megatron.core.transformer.pipeline_parallel_layer_layout"
TIMERS = "megatron.core.timers"
DATASET_UTILS = "megatron.core.datasets.utils"
DATASET_EXTENSION = "megatron.core.datasets.helpers_cpp"
RANDOM = "megatron.core.tensor_parallel.random"
TENSOR_PARALLEL = "megatron.core.tensor_parallel"
LAYERS = "megatron.core.tensor_parallel.layers"
TORCH_NORM = "megatron.core.transformer.torch_norm"
MOE_UTILS = "megatron.core.transformer.moe.moe_utils"
FUSED_KERNELS = "megatron.legacy.fused_kernels"
ARGUMENTS = "megatron.training.arguments"
TRAINING = "megatron.training.training"
OPTIMIZER = "megatron.core.optimizer.optimizer"
OPTIMIZERS = "megatron.core.optimizer"
DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
TRAINING_UTILS = "megatron.training.utils"
CHECKPOINTING = "megatron.training.checkpointing"
DIST_UTILS = "megatron.training.models.dist_utils"
MODEL_BUILDER = "megatron.training.models.gpt"
FINALIZE = "megatron.core.distributed.finalize_model_grads"
INITIALIZE = "megatron.training.initialize"
GPT = "megatron.core.models.gpt"
GPT_LAYERS = "megatron.core.models.gpt.gpt_layer_specs"
DISTRIBUTED = "megatron.core.distributed"
DATA_PARALLEL = "megatron.core.distributed.distributed_data_parallel"
ENUMS = "megatron.core.transformer.enums"
MODULE = "megatron.core.transformer.module"
BLOCK = "megatron.core.transformer.transformer_block"
LAYER = "megatron.core.transformer.transformer_layer"
ATTENTION = "megatron.core.transformer.attention"


@dataclass(frozen=True)
class HookPoint:
    """One symbol.

    A parameter or attribute that only some releases have is written with them:
    ``"model_type <0.17"`` was gone in 0.17, ``"force_all_reduce >=0.16"`` came with 0.16.

    Attributes:
        module: where it lives.
        name: its name there, dotted for a class's method.
        parameters: that are passed to it.
        attributes: that are read of it, or of its instances.
        releases: that have it, written as above; empty for all.
        positional: the parameters are passed by position, so they must be the first, in order.
        feature: what of this package needs it.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    releases: str = ""
    positional: bool = False
    feature: Feature = "schedule"

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


FORWARD_BACKWARD = HookPoint(
    SCHEDULES,
    "forward_backward_pipelining_without_interleaving",
    (
        *("forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length"),
        *("micro_batch_size", "decoder_seq_length", "forward_only", "collect_non_loss_data"),
        *("adjust_tensor_shapes_fn", "p2p_communicator"),
        *("grad_finalize_pgs <0.15", "pg_collection >=0.15", "force_all_reduce >=0.16"),
    ),
)
FORWARD_BACKWARD_INTERLEAVED = HookPoint(
    SCHEDULES,
    "forward_backward_pipelining_with_interleaving",
    FORWARD_BACKWARD.parameters,
)
BACKWARD_STEP = HookPoint(
    SCHEDULES,
    "backward_step",
    ("input_tensor", "output_tensor", "output_tensor_grad", "config", "model_type <0.17"),
)


def _message(name: str, *parameters: str) -> HookPoint:
    return HookPoint(SCHEDULES, f"P2PCommunicator.{name}", parameters, positional=True)


def _exchange(name: str, *parameters: str) -> HookPoint:
    return HookPoint(SCHEDULES, f"P2PCommunicator.{name}", parameters)


def _group(name: str, *parameters: str) -> HookPoint:
    return HookPoint(PARALLEL_STATE, name, parameters, releases="<0.15")


_SCHEDULE = (
    FORWARD_BACKWARD,
    FORWARD_BACKWARD_INTERLEAVED,
    HookPoint(
        SCHEDULES,
        "forward_step",
        (
            *("forward_step_func", "data_iterator", "model", "num_microbatches", "input_tensor"),
            *("forward_data_store", "config", "cp_group_size", "collect_non_loss_data"),
            *("checkpoint_activations_microbatch", "is_first_microbatch", "current_microbatch"),
            *("vp_stage", "is_last_stage"),
        ),
    ),
    BACKWARD_STEP,
    HookPoint(
        SCHEDULES,
        "deallocate_output_tensor",
        ("out", "deallocate_pipeline_outputs"),
        positional=True,
    ),
    HookPoint(
        SCHEDULES,
        "get_tensor_shapes",
        (
            *("seq_length", "micro_batch_size", "decoder_seq_length"),
            *("config", "tp_group", "cp_group"),
        ),
    ),
    HookPoint(SCHEDULES, "clear_embedding_activation_buffer", ("config", "model", "is_last_stage")),
    HookPoint(
        SCHEDULES,
        "finish_embedding_wgrad_compute",
        ("config", "embedding_module", "is_last_stage", "tp_group"),
    ),
    HookPoint(SCHEDULES, "get_model_config", ("model",), positional=True),
    HookPoint(SCHEDULES, "P2PCommunicator", ("pp_group", "config"), ("pp_group",)),
    _message("recv_forward", "tensor_shapes", "is_first_stage"),
    _message("recv_backward", "tensor_shapes", "is_last_stage"),
    _message("send_forward", "output_tensors", "is_last_stage"),
    _message("send_backward", "input_tensor_grads", "is_first_stage"),
    _message("send_forward_recv_backward", "output_tensors", "tensor_shapes", "is_last_stage"),
    _message("send_backward_recv_forward", "input_tensor_grads", "tensor_shapes", "is_first_stage"),
    _exchange("send_forward_recv_forward", "recv_prev", "tensor_shape", "overlap_p2p_comm"),
    _exchange("send_backward_recv_backward", "recv_next", "tensor_shape", "overlap_p2p_comm"),
    _exchange(
        *("send_forward_backward_recv_forward_backward", "recv_prev", "recv_next"), "tensor_shape"
    ),
    # the process groups of a call that brings none: three ways so far
    HookPoint(SCHEDULES, "parallel_state"),
    HookPoint(SCHEDULES, "_build_default_pg_collection", releases=">=0.19"),
    HookPoint(
        SCHEDULES,
        "ProcessGroupCollection",
        attributes=("use_mpu_process_groups", "tp", "cp"),
        releases=">=0.15",
    ),
    HookPoint(
        SCHEDULES,
        "GradFinalizeProcessGroups",
        attributes=("tp", "cp", "pp", "embd", "pos_embd", "dp_cp"),
        releases="<0.15",
    ),
    HookPoint(PARALLEL_STATE, "get_pipeline_model_parallel_group"),
    _group("get_tensor_model_parallel_group"),
    _group("get_context_parallel_group"),
    _group("get_embedding_group", "check_initialized"),
    _group("get_position_embedding_group", "check_initialized"),
    _group("get_data_parallel_group", "with_context_parallel"),
    HookPoint(
        CONFIG,
        "TransformerConfig",
        attributes=(
            # what the schedule does beside computing and sending
            *("timers", "barrier_with_L1_time", "no_sync_func", "grad_sync_func"),
            *("finalize_model_grads_func", "calculate_per_token_loss", "overlap_p2p_comm"),
            *("param_sync_func", "microbatch_group_size_per_vp_stage", "sequence_parallel"),
            *(
                "deallocate_pipeline_outputs",
                "num_microbatches_with_partial_activation_checkpoints",
            ),
            # the model's sizes, for the forecast of a slow link
            *("hidden_size", "ffn_hidden_size", "gated_linear_unit", "num_layers"),
            *("num_attention_heads", "num_query_groups", "num_moe_experts"),
            *("moe_ffn_hidden_size", "moe_router_topk"),
            # layers that each stage recomputes
            *("recompute_granularity", "recompute_method", "recompute_num_layers"),
            # weight gradients apart from B, in Transformer Engine's layers
            *("delay_wgrad_compute", "__post_init__"),
            # whether micro-batches may differ in what they save
            *("moe_pad_expert_input_to_capacity", "variable_seq_lengths"),
        ),
    ),
    HookPoint(
        LAYOUT,
        "PipelineParallelLayerLayout",
        attributes=("get_num_stages_from_str",),
    ),
    # weight gradients apart from B
    HookPoint(
        LAYERS,
        "linear_with_grad_accumulation_and_async_allreduce",
        (
            *("input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad"),
            *("sequence_parallel", "grad_output_buffer", "wgrad_deferral_limit", "tp_group"),
        ),
    ),
    HookPoint(LAYERS, "gather_from_sequence_parallel_region", ("group",)),
    HookPoint(LAYERS, "prepare_input_tensors_for_wgrad_compute"),
    HookPoint(TIMERS, "Timers.__call__", ("name", "log_level")),
    HookPoint(TIMERS, "Timer.start", ("barrier",)),
    HookPoint(TIMERS, "Timer.stop"),
    HookPoint(PARALLEL_STATE, "initialize_model_parallel"),
)

_TRAINING = tuple(
    HookPoint(module, name, parameters, feature="training")
    for module, name, parameters in (
        (ARGUMENTS, "add_megatron_arguments", ("parser",)),
        (TRAINING, "train", ()),
        (TRAINING, "training_log", ("iteration",)),
        (CHECKPOINTING, "check_checkpoint_args", ("checkpoint_args",)),
        (TRAINING, "get_args", ()),
        (TRAINING, "get_current_global_batch_size", ()),
        (TRAINING, "get_tensorboard_writer", ()),
        (TRAINING, "get_wandb_writer", ()),
        (TRAINING, "save_checkpoint", ()),
        (TRAINING, "get_num_microbatches", ()),
        (TRAINING, "update_num_microbatches", ("consumed_samples", "consistency_check")),
        (TRAINING, "logical_and_across_model_parallel_group", ()),
        (TRAINING, "reduce_max_stat_across_model_parallel_group", ()),
        (TRAINING, "print_rank_last", ()),
        (TRAINING_UTILS, "print_rank_0", ()),
        (DATASET_UTILS, "compile_helpers", ()),
    )
)

# read to say what stock cannot resume
_RESUME = (HookPoint(DISTRIBUTED_OPTIMIZER, "HAVE_APEX_OR_TE", feature="training"),)

# replaced under the V placement; reasons in patches/v_placement/__init__.py
_V_PLACEMENT = tuple(
    HookPoint(module, name, parameters, releases=releases, feature="v_placement")
    for module, name, parameters, releases in (
        (PARALLEL_STATE, "get_pipeline_model_parallel_group", (), ""),
        (PARALLEL_STATE, "set_pipeline_model_parallel_rank", ("rank",), ""),
        (PARALLEL_STATE, "is_pipeline_last_stage", ("ignore_virtual", "vp_stage"), ""),
        (PARALLEL_STATE, "initialize_model_parallel", ("get_embedding_ranks",), ""),
        (TRAINING, "get_model", (), ""),
        (TRAINING, "get_megatron_optimizer", ("config", "model_chunks"), ""),
        (DIST_UTILS, "build_virtual_pipeline_stages", (), ">=0.18"),
        (FINALIZE, "_allreduce_word_embedding_grads", ("model",), ""),
    )
)
_ONE_WEIGHT = (
    HookPoint(
        OPTIMIZERS,
        "OptimizerConfig",
        attributes=("use_distributed_optimizer", "optimizer"),
        feature="v_placement",
    ),
)

# replaced where a second pipeline goes up; reasons in patches/chimera/__init__.py
_BOTH_WAYS = tuple(
    HookPoint(module, name, parameters, attributes, releases, feature="both_ways")
    for module, name, parameters, attributes, releases in (
        (PARALLEL_STATE, "get_pipeline_model_parallel_group", (), (), ""),
        (PARALLEL_STATE, "set_pipeline_model_parallel_rank", ("rank",), (), ""),
        (PARALLEL_STATE, "get_data_parallel_group", (), (), ""),
        (PARALLEL_STATE, "initialize_model_parallel", ("get_embedding_ranks",), (), ""),
        (TRAINING, "get_model", (), (), ""),
        (TRAINING, "build_train_valid_test_data_iterators", (), (), ""),
        (TRAINING, "get_megatron_optimizer", ("config", "model_chunks"), (), ""),
        (TRAINING, "save_checkpoint", ("iteration", "model", "optimizer"), (), ""),
        (TRAINING, "load_checkpoint", ("ddp_model", "optimizer", "pp_group >=0.16"), (), ""),
        (MODEL_BUILDER, "unimodal_build_distributed_models", (), (), ">=0.19"),
        (DATA_PARALLEL, "DistributedDataParallel", (), ("__init__",), ""),
        (OPTIMIZER, "ChainedOptimizer", (), ("chained_optimizers",), ""),
        (FINALIZE, "_allreduce_word_embedding_grads", ("model",), (), ""),
    )
)

# replaced for schedules without a flush; reasons in patches/flush_free/gatherings.py
_FLUSH_FREE = (
    HookPoint(OPTIMIZER, "ChainedOptimizer", attributes=("get_grad_norm",), feature="training"),
)

_CPU = (
    HookPoint(ARGUMENTS, "validate_args", ("args", "defaults"), positional=True, feature="cpu"),
    HookPoint(INITIALIZE, "initialize_megatron", ("allow_no_cuda",), feature="cpu"),
    HookPoint(FUSED_KERNELS, "load", ("args",), releases="<0.17", feature="cpu"),
    HookPoint(
        TORCH_NORM,
        "WrappedTorchNorm",
        ("config",),
        attributes=("__new__",),
        feature="cpu",
    ),
    HookPoint(MOE_UTILS, "maybe_move_tensor_to_cpu", ("tensor", "as_numpy"), feature="cpu"),
    HookPoint(CONFIG, "TransformerConfig", attributes=("sequence_parallel",), feature="cpu"),
)

_PROFILE = tuple(
    HookPoint(module, name, parameters, attributes, feature="profile")
    for module, name, parameters, attributes in (
        (ARGUMENTS, "parse_args", ("extra_args_provider",), ()),
        (ARGUMENTS, "core_transformer_config_from_args", ("args",), ()),
        (PARALLEL_STATE, "destroy_model_parallel", (), ()),
        (PARALLEL_STATE, "get_global_memory_buffer", (), ()),
        (
            PARALLEL_STATE,
            "initialize_model_parallel",
            (
                *("tensor_model_parallel_size", "expert_tensor_parallel_size"),
                "create_gloo_process_groups",
            ),
            (),
        ),
        (TENSOR_PARALLEL, "get_cuda_rng_tracker", (), ()),
        (TENSOR_PARALLEL, "model_parallel_cuda_manual_seed", ("seed",), ()),
        (
            GPT,
            "GPTModel",
            (
                *("config", "transformer_layer_spec", "vocab_size", "max_sequence_length"),
                *("pre_process", "post_process", "share_embeddings_and_output_weights"),
                *("fp16_lm_cross_entropy", "position_embedding_type", "rotary_percent"),
                *("rotary_base", "rope_scaling", "seq_len_interpolation_factor"),
            ),
            ("set_input_tensor", "decoder"),
        ),
        (GPT, "GPTModel.forward", ("labels",), ()),
        (
            GPT_LAYERS,
            "get_gpt_decoder_block_spec",
            ("config", "use_transformer_engine", "normalization", "qk_l2_norm"),
            (),
        ),
        (BLOCK, "TransformerBlock", (), ("layers",)),
        (BLOCK, "TransformerBlockSubmodules", (), ("layer_specs",)),
        (LAYER, "TransformerLayerSubmodules", (), ("self_attention",)),
        (ATTENTION, "SelfAttentionSubmodules", (), ("core_attention",)),
        (
            DISTRIBUTED,
            "DistributedDataParallel",
            ("config", "ddp_config", "module"),
            ("no_sync", "zero_grad_buffer", "start_grad_sync", "ddp_config"),
        ),
        (DISTRIBUTED, "DistributedDataParallelConfig", ("grad_reduce_in_fp32",), ()),
        (ENUMS, "AttnBackend", (), ("flash", "unfused")),
        (ENUMS, "AttnMaskType", (), ("causal",)),
        (MODULE, "Float16Module", ("config", "module"), ()),
        (MODULE, "MegatronModule", ("config",), ()),
        (CONFIG, "TransformerConfig", (), ("kv_channels", "attention_dropout")),
    )
)

HOOK_POINTS: tuple[HookPoint, ...] = (
    *_SCHEDULE,
    *_TRAINING,
    *_RESUME,
    *_V_PLACEMENT,
    *_BOTH_WAYS,
    *_ONE_WEIGHT,
    *_FLUSH_FREE,
    *_CPU,
    *_PROFILE,
)
