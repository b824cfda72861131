"""The process groups of a call that brings none, as Megatron's own schedule makes them.

What they are called and who makes them has changed twice (`checks/hook_points.py`).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

# The schedule's parameter for them: one of these.
GROUPS_NAMES = ("pg_collection", "grad_finalize_pgs")
# Those that the schedule's helpers look at; releases without one of them do without.
NEEDED = ("tp", "cp", "pp", "embd", "pos_embd", "dp_cp", "tp_dp_cp")


def default_groups(schedules: Any) -> Any:
    """Collect Megatron's global process groups.

    Args:
        schedules: Megatron's module.
    """
    if hasattr(schedules, "_build_default_pg_collection"):
        return schedules._build_default_pg_collection()
    if hasattr(schedules, "ProcessGroupCollection"):
        known = {field.name for field in fields(schedules.ProcessGroupCollection)}
        return schedules.ProcessGroupCollection.use_mpu_process_groups(
            [name for name in NEEDED if name in known]
        )
    parallel_state = schedules.parallel_state
    groups = schedules.GradFinalizeProcessGroups()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups
