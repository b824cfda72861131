"""One process of a placed job: argv[1] is the launcher's environment of every physical rank."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bpipe.integration.rank_mapping import mapping as ranks
from megatron_bpipe.placement import PlacementError

physical = int(os.environ["RANK"])
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
    del os.environ[name]
os.environ.update(json.loads(sys.argv[1])[physical])

args = SimpleNamespace(pipeline_model_parallel_size=4, tensor_model_parallel_size=1)
mapped = ranks.set_rank(args, "pair-adjacent")
assert mapped.physical == physical
assert args.local_rank == physical % 4

dist.init_process_group("gloo")
assert dist.get_rank() == mapped.logical
parallel_state.initialize_model_parallel(1, 4)
stage = parallel_state.get_pipeline_model_parallel_rank()
table = ranks.verify(mapped, stage)
if dist.get_rank() == 0:
    sys.stdout.write(table)

# Every rank of this pipeline, in the order of its stages: the partner is on the same node of four.
line: list[int | None] = [None] * 4
dist.all_gather_object(line, physical, parallel_state.get_pipeline_model_parallel_group())
assert line[stage] == physical
assert line[3 - stage] is not None
assert line[3 - stage] // 4 == physical // 4, line

# A wrong stage on one rank is seen by all.
with pytest.raises(PlacementError, match="rank 0 is stage 1, not 0"):
    ranks.verify(mapped, stage if physical else stage + 1)

# Why RANK is changed and not the order of a group's ranks: torch sorts them.
group = dist.new_group([3, 0, 2, 1])
if dist.get_rank() < 4:
    assert dist.get_process_group_ranks(group) == [0, 1, 2, 3]
dist.destroy_process_group()
