"""What Megatron's flags describe: the estimator's Model, and the share of it that one rank has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model, padded_vocab
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.integration.model_from_args import model_from
from megatron_bpipe.integration.profile.settings import ProfileError

# how Megatron's recompute flags say each way to compute attention
RECOMPUTE: dict[Attention, dict[str, Any]] = {
    "none": {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    "recompute": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
        "recompute_method": None,
        "recompute_num_layers": None,
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
RECOMPUTE["flash"] = RECOMPUTE["none"]

# one stage on its own: what cuts the model up otherwise
ALONE: dict[str, Any] = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "expert_model_parallel_size": 1,
    # these overlap messages that are not sent here
    "tp_comm_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    "distribute_saved_activations": False,
}


@dataclass(frozen=True)
class Share:
    """One rank's share of one stage.

    Attributes:
        args: Megatron's arguments for the whole model.
        model: the whole model.
        layers: of the stage.
        vocab: rows of the whole output layer, with Megatron's padding.
        dtype: of the activations.
    """

    args: Any
    model: Model
    layers: int
    vocab: int
    dtype: torch.dtype

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return int(self.args.tensor_model_parallel_size)

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return self.dtype.itemsize

    @property
    def local_tokens(self) -> int:
        """Positions of a sequence that this rank holds between the tensor-parallel parts."""
        return int(self.args.seq_length) // (self.tp if self.args.sequence_parallel else 1)

    def alone(self, layers: int, attention: Attention) -> Any:
        """Megatron's arguments for this rank's ``layers`` layers, with nothing before or after."""
        args = copy.copy(self.args)
        changed = ALONE | RECOMPUTE[attention]
        changed |= {"num_layers": layers, "encoder_num_layers": layers}
        if args.num_experts:
            # expert parallelism divided out: fewer experts, each with the tokens of all its ranks
            changed["num_experts"] = args.num_experts // args.expert_model_parallel_size
        for name, value in changed.items():
            setattr(args, name, value)
        return args


def share_of(args: Any, layers: int | None) -> Share:
    """What one rank holds of the model; ``layers`` None: those of one of its stages.

    Raises:
        ProfileError: the layers do not divide into stages, or no rank holds enough experts.
    """
    model, stages = model_of(args), args.pipeline_model_parallel_size
    if layers is None and model.layers % stages:
        raise ProfileError(
            f"--num-layers {model.layers} is not divisible by --pipeline-model-parallel-size "
            f"{stages}: say with --layers how many to measure"
        )
    local = model.experts // args.expert_model_parallel_size
    if model.experts and local < model.experts_per_token:
        raise ProfileError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size} leaves a rank {local} "
            f"of --num-experts {model.experts}, fewer than --moe-router-topk "
            f"{model.experts_per_token}: profile with a smaller expert-parallel size"
        )
    padded = getattr(args, "padded_vocab_size", None)
    multiple = args.make_vocab_size_divisible_by
    return Share(
        args=args,
        model=model,
        layers=model.layers // stages if layers is None else layers,
        vocab=padded or padded_vocab(model.vocab, args.tensor_model_parallel_size, multiple),
        dtype=args.params_dtype,
    )


def model_of(args: Any) -> Model:
    """The estimator's Model for Megatron's validated arguments.

    Raises ProfileError where the sizes cannot be.
    """
    vocab = args.vocab_size or getattr(args, "padded_vocab_size", None)
    if not vocab:
        raise ProfileError(
            "--vocab-size is missing: give the vocabulary's size after --, no tokenizer is read"
        )
    try:
        return model_from(args, f"{args.num_layers} layers of {args.hidden_size}", vocab)
    except EstimateError as error:
        raise ProfileError(f"Megatron's flags: {error}") from error
