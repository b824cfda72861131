"""The user's flags of Megatron, parsed and checked by Megatron's own code, without its output."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_bpipe.integration import cpu
from megatron_bpipe.integration.bootstrap.torch_norms import (
    let_torch_norms_have_sequence_parallelism,
)
from megatron_bpipe.integration.checks.driver import why_unusable
from megatron_bpipe.integration.checks.hook_points import ARGUMENTS
from megatron_bpipe.integration.options import add_flags
from megatron_bpipe.integration.profile.settings import ProfileError

NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")

# attribute of the parsed flags, value that is allowed, what to do otherwise
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("multi_latent_attention", False, "the estimator knows multi-head and grouped-query attention"),
    ("experimental_attention_variant", None, "the estimator knows ordinary attention"),
    ("attention_output_gate", False, "the estimator knows ordinary attention"),
    ("window_size", None, "the estimator knows attention over the whole sequence"),
    ("softmax_type", "vanilla", "torch's SDPA has no other softmax: leave it out"),
    ("heterogeneous_layers_config_path", None, "all layers must be alike"),
    ("heterogeneous_layers_config_encoded_json", None, "all layers must be alike"),
    ("hybrid_layer_pattern", None, "all layers must be transformer layers"),
    ("hybrid_override_pattern", None, "all layers must be transformer layers"),
    ("moe_layer_freq", 1, "all layers must be alike: profile with 1"),
    ("moe_shared_expert_intermediate_size", None, "the estimator knows routed experts only"),
    ("moe_latent_size", None, "the estimator knows experts of the hidden size only"),
    ("mtp_num_layers", None, "leave it out: it belongs to the last stage only"),
    ("spec", None, "leave it out: the layers are chosen by --transformer-impl"),
    ("yaml_cfg", None, "give the model as flags"),
    ("use_checkpoint_args", False, "give the model as flags"),
    ("context_parallel_size", 1, "leave it out: one device holds whole sequences here"),
    ("use_torch_fsdp2", False, "leave it out"),
    ("use_megatron_fsdp", False, "leave it out"),
    ("fp8", None, "leave it out: fp32, bf16 and fp16 are measured"),
    ("fp4", None, "leave it out: fp32, bf16 and fp16 are measured"),
    ("cuda_graph_impl", "none", "leave it out"),
    ("cpu_offloading_num_layers", 0, "leave it out: it hides what the layers keep"),
    ("fine_grained_activation_offloading", False, "leave it out: it hides what the layers keep"),
    ("moe_paged_stash", False, "leave it out: it hides what the layers keep"),
)


def read_flags(words: Sequence[str]) -> Any:
    """Megatron's arguments for these flags, as its training loop would see them.

    Flags of --bpipe are accepted and play no role. On a machine without a GPU the CPU stands in
    from here on.

    Raises:
        ProfileError: there is no such training loop, a flag is wrong, or the model is of a kind
            that the estimator does not know.
    """
    if not torch.cuda.is_available():
        unusable = why_unusable()
        if unusable is not None:
            raise ProfileError(unusable)
        cpu.install()
    else:
        let_torch_norms_have_sequence_parallelism()
    # Megatron asserts it with tensor parallelism, and a real run has it
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    arguments = _arguments()
    with _megatron_speaks():
        args = _parse(arguments, list(words))
        _check(args)
        args.rank = 0
        args.world_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        if args.micro_batch_size is None:
            args.micro_batch_size = 1  # what --micro-batches is for; Megatron insists on one
        if args.max_position_embeddings is None:
            args.max_position_embeddings = args.seq_length
        arguments.validate_args(args, {})
    return args


def _arguments() -> Any:
    try:
        return importlib.import_module(ARGUMENTS)
    except ImportError as error:
        raise ProfileError(
            f"Megatron's argument parser cannot be imported ({error}): install megatron-core 0.18 "
            "or later, or run in a Megatron-LM checkout"
        ) from error


@contextlib.contextmanager
def _megatron_speaks() -> Iterator[None]:
    """Keep what Megatron prints, and turn its ways to refuse into a ProfileError."""
    out, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            yield
    except SystemExit as leaving:
        said = [line for line in errors.getvalue().splitlines() if line.strip()]
        last = said[-1] if said else f"it left with status {leaving.code}"
        message = last.partition("error: ")[2] or last.removeprefix("bpipe: ")
        raise ProfileError(f"Megatron's flags: {message}") from None
    except ProfileError:
        raise
    except Exception as error:
        # many of its assertions have no message: their source line has to do
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split()) or frame.line or type(error).__name__
        raise ProfileError(f"Megatron refuses its flags: {reason}") from error


def _parse(arguments: Any, words: list[str]) -> Any:
    def with_bpipe(parser: Any) -> Any:
        known = {option for action in parser._actions for option in action.option_strings}
        if "--bpipe" not in known:
            add_flags(parser)
        return parser

    stock = sys.argv
    sys.argv = ["profile", *words]
    try:
        return arguments.parse_args(with_bpipe)
    finally:
        sys.argv = stock


def _check(args: Any) -> None:
    for name in NEEDED:
        if getattr(args, name) is None:
            raise ProfileError(f"{_flag(name)} is missing: give it after --, with Megatron's flags")
        if getattr(args, name) < 1:
            raise ProfileError(f"{_flag(name)} {getattr(args, name)}: give a positive number")
    for name, allowed, remedy in REFUSED:
        value = getattr(args, name, allowed)
        if value != allowed and value is not None:
            shown = "" if value is True else f" {value}"
            raise ProfileError(f"{_flag(name)}{shown} cannot be profiled: {remedy}")
    if args.fp16 and args.bf16:
        raise ProfileError("--fp16 and --bf16 exclude each other: give one of them")
    uneven = (
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
        "account_for_loss_in_pipeline_split",
    )
    stages = args.pipeline_model_parallel_size
    if args.num_layers % stages and not any(getattr(args, name, None) for name in uneven):
        raise ProfileError(
            f"--num-layers {args.num_layers} is not divisible by --pipeline-model-parallel-size "
            f"{stages}: change one of them"
        )
    tp, heads, groups = args.tensor_model_parallel_size, args.num_attention_heads, _groups(args)
    if heads % tp:
        raise ProfileError(
            f"--num-attention-heads {heads} is not divisible by --tensor-model-parallel-size {tp}"
            ": change one of them"
        )
    if args.hidden_size % heads:
        raise ProfileError(
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {heads}: "
            "change one of them"
        )
    if heads % groups or groups % tp:
        raise ProfileError(
            f"--num-query-groups {groups} must divide --num-attention-heads {heads} and be "
            f"divisible by --tensor-model-parallel-size {tp}: change one of them"
        )
    if args.sequence_parallel and args.seq_length % tp:
        raise ProfileError(
            f"--seq-length {args.seq_length} is not divisible by --tensor-model-parallel-size {tp}"
            ", as --sequence-parallel needs: change one of them"
        )
    if args.transformer_impl == "transformer_engine":
        try:
            importlib.import_module("transformer_engine.pytorch")
        except ImportError as error:
            raise ProfileError(
                "--transformer-impl transformer_engine (Megatron's default) needs Transformer "
                f"Engine, which cannot be imported ({error}): add --transformer-impl local"
            ) from error


def _groups(args: Any) -> int:
    groups = args.num_query_groups if args.group_query_attention else None
    return int(groups or args.num_attention_heads)


def _flag(name: str) -> str:
    renamed = {
        "fp8": "--fp8-format",
        "fp4": "--fp4-format",
    }
    return renamed.get(name, "--" + name.replace("_", "-"))
