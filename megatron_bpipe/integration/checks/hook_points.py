"""Does the Megatron at hand have everything this patch set touches? By capability, not version.

Every symbol is named once here, with the parameters that are passed to it. What may be absent in
some releases (`call_known` then leaves an argument out) is not asked for. The version number
decides one thing only: whether to warn that nobody has tried it.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

# Minor releases that scripts/version_matrix.py has run (docs/results/versions.md); 0.20 is main.
KNOWN_RELEASES = ("0.14", "0.15", "0.16", "0.17", "0.18", "0.19", "0.20")

SCHEDULES = "megatron.core.pipeline_parallel.schedules"
ARGUMENTS = "megatron.training.arguments"
TRAINING = "megatron.training.training"


@dataclass(frozen=True)
class HookPoint:
    """A symbol that is replaced, wrapped or called.

    Attributes:
        module: where it lives.
        name: its name there, dotted for a class's method.
        parameters: names it must accept, of ``a|b`` one.
        training: it belongs to the training loop, which early wheels lack.
        otherwise: what other releases have in its place; one of them will do.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    training: bool = False
    otherwise: tuple[HookPoint, ...] = ()

    def __str__(self) -> str:
        takes = f"({', '.join(self.parameters)})" if self.parameters else ""
        return f"{self.module}.{self.name}{takes}"


HOOK_POINTS = (
    HookPoint(
        SCHEDULES,
        "forward_backward_pipelining_without_interleaving",
        (
            *("forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length"),
            *("micro_batch_size", "decoder_seq_length", "forward_only", "collect_non_loss_data"),
            *("adjust_tensor_shapes_fn", "p2p_communicator", "pg_collection|grad_finalize_pgs"),
        ),
    ),
    HookPoint(
        SCHEDULES,
        "forward_step",
        (
            *("forward_step_func", "data_iterator", "model", "num_microbatches", "input_tensor"),
            *("forward_data_store", "config", "collect_non_loss_data", "current_microbatch"),
            *("checkpoint_activations_microbatch", "is_first_microbatch"),
        ),
    ),
    HookPoint(
        SCHEDULES,
        "backward_step",
        ("input_tensor", "output_tensor", "output_tensor_grad", "config"),
    ),
    HookPoint(SCHEDULES, "deallocate_output_tensor", ("out", "deallocate_pipeline_outputs")),
    HookPoint(SCHEDULES, "get_tensor_shapes", ("seq_length", "micro_batch_size", "config")),
    HookPoint(SCHEDULES, "clear_embedding_activation_buffer", ("config", "model")),
    HookPoint(SCHEDULES, "finish_embedding_wgrad_compute", ("config", "embedding_module")),
    HookPoint(SCHEDULES, "get_model_config"),
    HookPoint(SCHEDULES, "get_forward_backward_func"),
    HookPoint(SCHEDULES, "parallel_state.get_pipeline_model_parallel_group"),
    HookPoint(
        SCHEDULES,
        "_build_default_pg_collection",
        otherwise=(
            HookPoint(SCHEDULES, "ProcessGroupCollection.use_mpu_process_groups"),
            HookPoint(SCHEDULES, "GradFinalizeProcessGroups"),
        ),
    ),
    HookPoint(SCHEDULES, "P2PCommunicator", ("pp_group", "config")),
    HookPoint(SCHEDULES, "P2PCommunicator.recv_forward", ("tensor_shapes", "is_first_stage")),
    HookPoint(SCHEDULES, "P2PCommunicator.recv_backward", ("tensor_shapes", "is_last_stage")),
    HookPoint(SCHEDULES, "P2PCommunicator.send_forward", ("output_tensors", "is_last_stage")),
    HookPoint(SCHEDULES, "P2PCommunicator.send_backward", ("input_tensor_grads", "is_first_stage")),
    HookPoint(
        SCHEDULES,
        "P2PCommunicator.send_forward_recv_backward",
        ("output_tensors", "tensor_shapes", "is_last_stage"),
    ),
    HookPoint(
        SCHEDULES,
        "P2PCommunicator.send_backward_recv_forward",
        ("input_tensor_grads", "tensor_shapes", "is_first_stage"),
    ),
    HookPoint(ARGUMENTS, "add_megatron_arguments", ("parser",), training=True),
    HookPoint(ARGUMENTS, "parse_args", training=True),
    HookPoint(TRAINING, "train", training=True),
)


def release() -> str:
    """The minor release of the importable Megatron-Core, such as ``0.19``."""
    # not megatron.core itself, which may be half imported when this is asked
    try:
        version = str(importlib.import_module("megatron.core.package_info").__version__)
    except (ImportError, AttributeError):
        return "of unknown version"
    return ".".join(version.split(".")[:2])


def missing(*, training: bool) -> list[str]:
    """Hook points that the importable Megatron lacks, each with what is wrong.

    Args:
        training: look at the training loop's too (slow to import the first time).
    """
    return [
        f"{point}: {problem}"
        for point in HOOK_POINTS
        if (training or not point.training) and (problem := _problem(point)) is not None
    ]


def _problem(point: HookPoint) -> str | None:
    if any(_lack(other) is None for other in point.otherwise):
        return None
    return _lack(point)


def _lack(point: HookPoint) -> str | None:
    try:
        found: object = importlib.import_module(point.module)
    except ImportError as error:
        return f"cannot be imported ({error})"
    for part in point.name.split("."):
        if not hasattr(found, part):
            return "is not there"
        found = getattr(found, part)
    if point.parameters:
        taken = inspect.signature(found).parameters  # type: ignore[arg-type]
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            lacking = [
                names for names in point.parameters if not taken.keys() & set(names.split("|"))
            ]
            if lacking:
                return f"does not take {', '.join(lacking)}"
    return None
