"""The fused softmax kernel's conditions, and the warning."""

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.models import model_named
from megatron_bpipe.estimate.paper.published import EXPERIMENTS
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.time.kernels.fused_softmax_rules import (
    RULES,
    softmax_trap,
    why_not_fused,
)


def test_gpt_3_96b_has_26_heads_a_rank():
    """Not at b = 1, yes at b = 2; at t = 2 (52 heads) already at b = 1."""
    assert why_not_fused(1, 104 // 4, 2048) == (
        "micro-batch 1 x 26 heads a rank = 26 is not a multiple of 4",
    )
    assert why_not_fused(2, 104 // 4, 2048) == ()
    assert why_not_fused(1, 104 // 2, 2048) == ()


def test_llama_65b_never_suffers():
    assert all(why_not_fused(b, 64 // 4, 2048) == () for b in (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("heads", "seq", "half", "rule", "word"),
    [
        (4, 16, True, "core", "sequence length 16"),
        (4, 8192, True, "core", "from 17 to 4096"),
        (4, 32768, True, "legacy", "from 17 to 16384"),
        (8, 2046, True, "core", "2046 is not a multiple of 4"),
        (4, 2048, False, "core", "not bf16 or fp16"),
        (4, 128, True, "core", "= 4 is not a multiple of 8"),
    ],
)
def test_the_other_conditions(heads, seq, half, rule, word):
    reasons = why_not_fused(1, heads, seq, RULES[rule], half_precision=half)
    assert word in " ".join(reasons)


def test_the_longest_sequence_depends_on_the_file():
    assert why_not_fused(1, 4, 8192, RULES["legacy"]) == ()
    assert why_not_fused(1, 4, 8192, RULES["2023"]) != ()


def test_of_table_3_only_row_7_is_in_the_trap():
    assert [e.id for e in EXPERIMENTS if softmax_trap(e.run(), RULES["2023"])] == [7]


def test_the_warning_names_the_remedies():
    run = Run(model_named("GPT-3 96B"), Layout(tp=4, pp=8), 1, 128, "recompute")
    warning = softmax_trap(run)
    assert warning is not None
    for word in ("26 heads", "flash attention", "tensor-parallel size 2", "micro-batch 2"):
        assert word in warning


def test_no_warning_where_another_micro_batch_would_not_help():
    run = Run(replace(model_named("GPT-3 96B"), seq=8192), Layout(tp=4), 1, 128, "none")
    assert softmax_trap(run, RULES["core"]) is None
