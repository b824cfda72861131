"""Clusters: presets, files, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import GPUS
from megatron_bpipe.planner.inputs.cluster import preset, read_cluster

GOOD = """
name = "old and new"
messages_gb_s = 2
[[nodes]]
count = 2
gpus = 8
gpu = "A100-80GB"
network_gb_s = 12.5
[[nodes]]
count = 1
gpus = 8
gpu = "H100-80GB"
"""


def test_presets_have_the_four_generations() -> None:
    assert {"A100-80GB", "H100-80GB", "H200", "B200"} <= set(GPUS)
    assert preset("B200", 64).gpus == 64
    assert preset("H200", 4).gpus_per_node == 4


def test_a_file_with_two_kinds(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(GOOD)
    cluster = read_cluster(path)
    assert (cluster.gpus, cluster.gpus_per_node, cluster.mixed) == (24, 8, True)
    assert [cluster.gpu_of(8 * n).name for n in range(3)] == ["A100-80GB"] * 2 + ["H100-80GB"]
    assert cluster.gpu_of(0).network == 12.5e9  # replaces the preset's 25
    assert cluster.gpu_of(0).nvlink == 300e9
    assert cluster.messages == 2e9
    assert cluster.peak == 16 * 312e12 + 8 * 989e12


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("network_gb_s = 12.5", "network_gb_s = 0", r"nodes\[0\].network_gb_s is 0"),
        ("network_gb_s = 12.5", "nvlink_gb_s = -3", r"nodes\[0\].nvlink_gb_s is -3"),
        ("network_gb_s = 12.5", "nvlink_gb_s = 300000", r"nodes\[0\].nvlink_gb_s is 300000"),
        ("network_gb_s = 12.5", "nvlink_gb_s = inf", r"nodes\[0\].nvlink_gb_s is inf"),
        ("network_gb_s = 12.5", 'host_gb_s = "15"', r"nodes\[0\].host_gb_s is '15'"),
        ("network_gb_s = 12.5", "matmul_share = 1.2", r"nodes\[0\].matmul_share is 1.2"),
        ("network_gb_s = 12.5", "speed = 1", r"nodes\[0\].speed is not known"),
        ("count = 1", "count = 0", r"nodes\[1\].count is 0"),
        ("count = 1", "", r"nodes\[1\].count is None"),
        ("H100-80GB", "K80", r"nodes\[1\].gpu is 'K80'"),
        ('gpu = "H100-80GB"', "memory_gib = 80", r"nodes\[1\].bf16_tflops is missing"),
        ("messages_gb_s = 2", "messages_gb_s = -1", "messages_gb_s is -1"),
        ('gpus = 8\ngpu = "A100', 'gpus = 4\ngpu = "A100', "4 and 8 GPUs"),
        ("[[nodes]]", "[[node]]", "node is not known"),
        ("count = 2", "count =", "is no TOML"),
    ],
)
def test_a_bad_file_names_its_field(tmp_path: Path, before: str, after: str, named: str) -> None:
    assert before in GOOD
    path = tmp_path / "c.toml"
    path.write_text(GOOD.replace(before, after))
    with pytest.raises(EstimateError, match=named) as caught:
        read_cluster(path)
    assert "\n" not in str(caught.value).split(" is no TOML")[0]


def test_no_file_and_nodes_that_are_not_full(tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match="No such file"):
        read_cluster(tmp_path / "none.toml")
    with pytest.raises(EstimateError, match="12 GPUs do not fill nodes of 8: use 8 or 16"):
        preset("H200", 12)
    with pytest.raises(EstimateError, match="K80"):
        preset("K80", 8)
