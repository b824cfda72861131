"""The logical rank of each process, from the environment of torchrun and of srun."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from megatron_bpipe.integration.rank_mapping.launcher import (
    PHYSICAL_RANK,
    LauncherError,
    launched_process,
)
from megatron_bpipe.integration.rank_mapping.mapping import _problem, incompatible_flags, set_rank
from megatron_bpipe.placement import PlacementError
from tests.harness import Megatron

FIGURE_2 = [0, 15, 1, 14, 2, 13, 3, 12, 4, 11, 5, 10, 6, 9, 7, 8]


def arguments(pp: int = 16, tp: int = 1, **more: object) -> SimpleNamespace:
    sizes = {"pipeline_model_parallel_size": pp, "tensor_model_parallel_size": tp}
    return SimpleNamespace(**sizes, **more)


def torchrun(rank: int, world: int = 16, here: int = 8) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "job",
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % here),
        "LOCAL_WORLD_SIZE": str(here),
        "GROUP_RANK": str(rank // here),
    }


def srun(rank: int, world: int = 16, here: int = 8) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % here),
        "SLURM_NODEID": str(rank // here),
        "SLURM_NTASKS": str(world),
        "SLURM_NNODES": str(world // here),
        "SLURM_TASKS_PER_NODE": f"{here}(x{world // here})",
    }


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_figure_2(launcher) -> None:  # type: ignore[no-untyped-def]
    for rank in range(16):
        environ, args = launcher(rank), arguments()
        ranks = set_rank(args, "pair-adjacent", environ)
        assert ranks.logical == FIGURE_2[rank]
        assert ranks.moves_ranks
        assert environ["RANK"] == str(FIGURE_2[rank])
        assert environ[PHYSICAL_RANK] == str(rank)
        assert environ["WORLD_SIZE"] == "16"
        assert environ["LOCAL_WORLD_SIZE"] == "8"
        assert environ["LOCAL_RANK"] == str(rank % 8), "the GPU stays"
        assert args.local_rank == rank % 8


def test_megatron_order_moves_nothing() -> None:
    environ = srun(5)
    ranks = set_rank(arguments(), "megatron", environ)
    assert (ranks.logical, environ["RANK"], environ["LOCAL_RANK"]) == (5, "5", "5")
    assert not ranks.moves_ranks


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_mapping_twice_is_mapping_once(launcher) -> None:  # type: ignore[no-untyped-def]
    """Megatron parses twice, and an in-process restart once more."""
    environ = launcher(3)
    first = set_rank(arguments(), "pair-adjacent", environ)
    assert set_rank(arguments(), "pair-adjacent", environ) == first
    assert environ["RANK"] == "14"
    environ["RANK"] = "3"  # a launcher that sets it anew in the same environment
    assert set_rank(arguments(), "pair-adjacent", environ) == first
    assert environ["RANK"] == "14"


def test_an_elastic_restart_with_another_world_maps_anew() -> None:
    fresh = torchrun(3, world=8, here=4)
    assert set_rank(arguments(8), "pair-adjacent", fresh).logical == 6


def test_odd_pipeline_has_a_middle_stage_without_partner() -> None:
    order = [set_rank(arguments(3), "pair-adjacent", torchrun(r, 6, 3)).logical for r in range(6)]
    assert sorted(order) == list(range(6))
    ranks = set_rank(arguments(3), "pair-adjacent", torchrun(0, 6, 3))
    assert ranks.report is not None
    assert ranks.report.after.pairs.across_nodes == 0


def test_order_of_use_tp_pp_dp_mapping() -> None:
    args = arguments(4, use_tp_pp_dp_mapping=True)
    ranks = set_rank(args, "pair-adjacent", torchrun(1, 8, 4))
    assert ranks.report is not None
    assert ranks.report.shape.order == "tp-cp-ep-pp-dp"
    assert ranks.report.placement[:4] == (0, 3, 1, 2)
    assert set_rank(arguments(4), "pair-adjacent", torchrun(1, 8, 4)).logical != ranks.logical


def test_started_alone_is_a_world_of_one() -> None:
    assert set_rank(arguments(1), "pair-adjacent", {}).logical == 0


def test_one_gpu_visible_to_each_task() -> None:
    environ = srun(11) | {"LOCAL_RANK": "0"}
    ranks = set_rank(arguments(), "pair-adjacent", environ)
    assert (ranks.logical, ranks.local_rank) == (FIGURE_2[11], 0)


def test_torchrun_inside_a_slurm_step_is_torchruns() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    assert set_rank(arguments(), "pair-adjacent", step | torchrun(12)).logical == FIGURE_2[12]


UNEQUAL = srun(5, 12, 4) | {"SLURM_TASKS_PER_NODE": "8,4"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (srun(3) | {"RANK": "5"}, "RANK is 5 but SLURM_PROCID is 3"),
        (srun(3) | {"WORLD_SIZE": "8", "RANK": "3"}, "WORLD_SIZE is 8 but SLURM_NTASKS is 16"),
        (UNEQUAL, "the nodes have 4 and 8 ranks"),
        (torchrun(9) | {"LOCAL_WORLD_SIZE": "5"}, "5 GPUs per node do not divide"),
        (torchrun(9) | {"GROUP_RANK": "0"}, "rank 9 is number 1 on node 0.* that is rank 1"),
        (srun(2) | {"SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, "--distribution=block"),
        (torchrun(1) | {PHYSICAL_RANK: "31"}, "BPIPE_PHYSICAL_RANK is 31.* left over"),
        (
            torchrun(3) | {PHYSICAL_RANK: "3", "RANK": "1"},
            "RANK is 1, but BPIPE_PHYSICAL_RANK is 3.* rank 14",
        ),
        (torchrun(16), "RANK is 16, but this job has ranks 0 to 15"),
        (torchrun(1) | {"RANK": "one"}, "RANK is 'one': expected a number"),
        ({"RANK": "1", "WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        (
            torchrun(3) | {PHYSICAL_RANK: "3", "RANK": "x"},
            "RANK is x, but BPIPE_PHYSICAL_RANK is 3",
        ),
        (srun(1) | {"SLURM_TASKS_PER_NODE": "8x2"}, "SLURM_TASKS_PER_NODE is '8x2'"),
        (torchrun(1, 24), "24 ranks is not a multiple of tp x cp x pp"),
    ],
)
def test_bad_environment_is_one_sentence(environ: dict[str, str], message: str) -> None:
    before = dict(environ)
    with pytest.raises(ValueError, match=message) as caught:
        set_rank(arguments(), "pair-adjacent", environ)
    assert isinstance(caught.value, LauncherError | PlacementError)
    assert "\n" not in str(caught.value)
    assert environ == before


def test_megatron_placement_takes_unequal_nodes() -> None:
    assert set_rank(arguments(4), "megatron", dict(UNEQUAL)).logical == 5
    unknown = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}  # another launcher
    ranks = set_rank(arguments(4), "megatron", unknown)
    assert (ranks.logical, ranks.local_rank, ranks.report) == (3, 1, None)
    assert "LOCAL_WORLD_SIZE" not in unknown
    assert launched_process(UNEQUAL).ranks_on_nodes == (8, 4)


def test_refusals_name_flag_value_and_remedy() -> None:
    assert incompatible_flags(arguments()) == []
    args = arguments(
        tp=2,
        async_save=True,
        use_persistent_ckpt_worker=True,
        replication=True,
        replication_jump=8,
        inprocess_restart=True,
        inprocess_active_world_size=12,
        expert_tensor_parallel_size=1,
        tensor_parallel_num_weight_shards=4,
    )
    found = incompatible_flags(args)
    assert [flag for flag, _, _ in found] == [
        "--use-persistent-ckpt-worker",
        "--replication --replication-jump",
        "--inprocess-active-world-size",
        "--expert-tensor-parallel-size",
        "--tensor-parallel-num-weight-shards",
    ]
    assert [value for _, value, _ in found] == [True, 8, 12, 1, 4]
    assert all("--bpipe-placement megatron" in remedy for _, _, remedy in found)
    args.async_save = args.replication = args.inprocess_restart = False
    args.expert_tensor_parallel_size, args.tensor_parallel_num_weight_shards = 2, 2
    assert incompatible_flags(args) == []


def test_what_is_not_as_placed_is_found() -> None:
    ranks = set_rank(arguments(4), "pair-adjacent", torchrun(0, 4, 2))
    assert ranks.report is not None
    assert ranks.report.placement == (0, 3, 1, 2)
    right = [(0, 0, "a", 0), (2, 0, "b", 1), (3, 1, "b", 2), (1, 1, "a", 3)]
    assert _problem(ranks, right) is None
    assert _problem(ranks, [(p, d, h, None) for p, d, h, _ in right]) is None

    def wrong(rank: int, **changed: object) -> str:
        names = ("physical", "local", "host", "stage")
        line = dict(zip(names, right[rank], strict=True)) | changed
        found = _problem(ranks, [*right[:rank], tuple(line.values()), *right[rank + 1 :]])  # type: ignore[list-item]
        assert found is not None
        return found

    assert wrong(1, physical=1) == "rank 1 runs on GPU 1 of the job, not on 2"
    assert wrong(2, host="c") == "GPU 3 of the job is on c, the rest of its node on b"
    assert wrong(3, stage=1) == "rank 3 is stage 1, not 3"
    assert _problem(ranks, right[:3]) == "placed 4 ranks, but torch.distributed has 3"


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_realised_by_torch_and_megatron(megatron: Megatron, launcher: str) -> None:
    """Eight processes as two nodes of four, PP 4 x DP 2, judged by Megatron's own groups."""
    environments = [(torchrun if launcher == "torchrun" else srun)(r, 8, 4) for r in range(8)]
    result = megatron.script("placed_ranks.py", [json.dumps(environments)], world=8)
    assert result.ok, result.logs
    tables = [rank for rank in range(8) if "across nodes" in result.log(rank)]
    assert tables == [0]
    assert "pairs (evictor, acceptor)  4 of 4          0 of 4" in result.log(0)
