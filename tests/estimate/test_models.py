"""Parameters against published counts, and models that cannot be."""

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import gpu_named
from megatron_bpipe.estimate.memory.parameters import (
    layer_parameters,
    model_parameters,
    stage_parameters,
)
from megatron_bpipe.estimate.models import (
    TABLE_2,
    gpt,
    llama,
    model_named,
    padded_vocab,
    swiglu_ffn,
)
from megatron_bpipe.estimate.runs import Layout, Run


def test_gpt2_small_has_its_published_parameters():
    model = gpt("GPT-2", hidden=768, heads=12, layers=12, seq=1024, vocab=50257)
    assert model_parameters(model) == 124_439_808


def test_llama_65b_has_its_published_parameters():
    assert model_parameters(model_named("LLaMA 65B")) == 65_285_660_672


def test_llama_2_70b_with_grouped_queries_has_its_published_parameters():
    model = llama("70B", hidden=8192, heads=64, kv_heads=8, layers=80, seq=4096, ffn=28672)
    assert model_parameters(model) == 68_976_648_192


def test_mixtral_8x7b_has_its_published_parameters():
    model = llama("8x7B", hidden=4096, heads=32, kv_heads=8, layers=32, seq=4096, ffn=14336)
    assert model_parameters(replace(model, experts=8, experts_per_token=2)) == 46_702_792_704


def test_table_2():
    """h, a, s, l as printed; GPT-3 96B is 12 l h^2 and a little."""
    assert [(m.hidden, m.heads, m.seq, m.layers) for m in TABLE_2.values()] == [
        (8192, 64, 2048, 80),
        (9984, 104, 2048, 80),
    ]
    assert model_parameters(TABLE_2["GPT-3 96B"]) == pytest.approx(96e9, rel=0.01)


def test_stages_of_all_ranks_hold_the_whole_model():
    """t = 4, p = 8: what the stages hold is the model, the second copy of the tied embedding, the
    vocabulary's padding and what every tensor-parallel rank repeats."""
    model = model_named("GPT-3 96B")
    run = Run(model, Layout(tp=4, pp=8), 1, 128, "none")
    held = 4 * sum(stage_parameters(run, stage).total for stage in range(8))
    h = model.hidden
    second_embedding = 51200 * h  # 51200 is a multiple of 4 x 128: no padding
    repeated = 3 * (80 * (4 * h + 2 * h) + 2 * h + 2048 * h)  # norms, row biases, positions
    assert held == model_parameters(model) + second_embedding + repeated


def test_untied_and_tied_heads():
    tied = gpt("tied", hidden=64, heads=4, layers=2, seq=32, vocab=512)
    untied = replace(tied, tied_embeddings=False)
    alone = [stage_parameters(Run(m, Layout(), 1, 1, "none"), 0).total for m in (tied, untied)]
    assert alone[1] - alone[0] == 512 * 64
    halves = [stage_parameters(Run(m, Layout(pp=2), 1, 1, "none"), 1).total for m in (tied, untied)]
    assert halves[0] == halves[1]


def test_experts_are_dealt_out_and_cut_by_t():
    model = replace(
        llama("moe", hidden=64, heads=4, layers=2, seq=32, ffn=128), experts=8, experts_per_token=2
    )
    whole = layer_parameters(model, Layout())
    assert whole.experts == 8 * 3 * 64 * 128
    assert layer_parameters(model, Layout(ep=4, dp=4)).experts == whole.experts // 4
    assert layer_parameters(model, Layout(ep=4, dp=4, tp=2)).experts == whole.experts // 8
    assert whole.dense == 4 * 64 * 64 + 2 * 64 + 64 * 8


def test_swiglu_width():
    """8/3 h of 4096 and 8192 is 10923 and 21846; LLaMA has 11008 and 22016."""
    assert [swiglu_ffn(h) for h in (4096, 8192)] == [11008, 22016]
    assert [swiglu_ffn(h, multiple=1) for h in (4096, 8192)] == [10923, 21846]
    assert swiglu_ffn(768, multiple=1) == 2048


def test_padded_vocabulary():
    assert padded_vocab(50257, tp=1) == 50304
    assert padded_vocab(50257, tp=8) == 51200
    assert padded_vocab(32000, tp=4) == 32256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, "hidden 64 is not a multiple of 5 heads"),
        ({"kv_heads": 3}, "4 heads are not a multiple of 3 key/value heads"),
        ({"layers": 0}, "layers is 0"),
        ({"experts": 4, "experts_per_token": 5}, "cannot visit 5 of 4 experts"),
    ],
)
def test_models_that_cannot_be(change, words):
    model = gpt("tiny", hidden=64, heads=4, layers=4, seq=32)
    with pytest.raises(EstimateError, match=words):
        replace(model, **change)


@pytest.mark.parametrize(
    ("layout", "batches", "words"),
    [
        (Layout(tp=8), (1, 8), "4 attention heads cannot be divided by the tensor-parallel size 8"),
        (Layout(pp=3), (1, 8), "4 layers cannot be divided by the number of stages 3: use 1, 2, 4"),
        (Layout(dp=3), (1, 8), "8 sequences of the global batch"),
        (Layout(cp=3), (1, 8), "32 tokens of a sequence"),
        (Layout(dp=2, ep=2), (1, 8), "1 experts cannot be divided by the expert-parallel size 2"),
        (Layout(), (0, 8), "micro_batch is 0"),
    ],
)
def test_runs_that_do_not_divide(layout, batches, words):
    model = gpt("tiny", hidden=64, heads=4, layers=4, seq=32)
    with pytest.raises(EstimateError, match=words):
        Run(model, layout, *batches, "none")


def test_unknown_names_say_what_is_known():
    with pytest.raises(EstimateError, match="'LLaMA 65B' or 'GPT-3 96B'"):
        model_named("LLaMA")
    with pytest.raises(EstimateError, match="use V100-32GB, A100-40GB, A100-80GB, L40S, H100-80GB"):
        gpu_named("A100")
    with pytest.raises(EstimateError, match="use none, recompute, flash, full"):
        Run(model_named("LLaMA 65B"), Layout(), 1, 1, "xformers")
    with pytest.raises(EstimateError, match="tp is 0"):
        Layout(tp=0)
    with pytest.raises(EstimateError, match=r"ep 3 x expert-tensor 1 does not divide .* 1 x 1 x 4"):
        Layout(dp=4, ep=3)
