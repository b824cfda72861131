"""Equation 1 by hand, its head term, and the count of torch's own FLOP counter."""

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.models import gpt, llama, model_named
from megatron_bpipe.estimate.time.flops import (
    equation_1,
    equation_1_corrected,
    head_flops,
    matmul_flops,
    mfu_percent,
)


def test_equation_1_as_printed():
    """GPT-3 96B, 128 sequences: 72 x 128 x 2048 x 80 x 9984^2 x (1 + 2048/59904 + v/12779520)."""
    expected = 72 * 128 * 2048 * 80 * 9984**2 * (1 + 2048 / 59904 + 51200 / (16 * 80 * 9984))
    assert equation_1(model_named("GPT-3 96B"), 128) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["LLaMA 65B", "GPT-3 96B"])
def test_the_printed_head_term_is_a_quarter_short(name):
    """v/(16 l h) in place of v/(12 l h): 0.08 and 0.10 % of the whole."""
    model = model_named(name)
    missing = equation_1_corrected(model, 1) - equation_1(model, 1)
    assert missing == pytest.approx(head_flops(model, 1) / 4)
    assert 0.0005 < missing / equation_1(model, 1) < 0.0015


def test_the_exact_count_of_a_gpt_is_equation_1_corrected():
    model = model_named("GPT-3 96B")
    assert matmul_flops(model, 3) == pytest.approx(equation_1_corrected(model, 3), rel=1e-12)


def test_the_exact_count_of_llama_with_8_thirds_h_is_too():
    """Section 3.1: three matrices of 8/3 h cost what two of 4 h cost."""
    model = replace(model_named("LLaMA 65B"), hidden=6144, heads=64, kv_heads=64, ffn=6144 * 8 // 3)
    assert matmul_flops(model, 1) == pytest.approx(equation_1_corrected(model, 1), rel=1e-12)


def test_rounding_the_ffn_up_adds_half_a_per_cent_to_llama():
    model = model_named("LLaMA 65B")
    assert matmul_flops(model, 1) / equation_1_corrected(model, 1) == pytest.approx(1.005, abs=1e-3)


def test_mfu():
    assert mfu_percent(flops=312e12, seconds=2.0, gpus=1, peak_flops=312e12) == 50.0


SMALL = [
    gpt("gpt", hidden=64, heads=4, layers=2, seq=32, vocab=512),
    llama("llama", hidden=48, heads=4, layers=3, seq=16, vocab=256, ffn=128),
    llama("gqa", hidden=64, heads=8, kv_heads=2, layers=2, seq=32, vocab=512),
]


@pytest.mark.parametrize("model", SMALL, ids=lambda m: m.name)
def test_torch_counts_the_same(model):
    """A decoder written out in matrix multiplications, forward and backward, counted by torch."""
    torch = pytest.importorskip("torch")
    counter = pytest.importorskip("torch.utils.flop_counter")
    b, s, h, d = 2, model.seq, model.hidden, model.hidden // model.heads

    def weight(*shape):
        return torch.randn(*shape, device="meta", requires_grad=True)

    def heads(x, count):
        x = x.view(b, s, count, d).transpose(1, 2)
        return x.repeat_interleave(model.heads // count, dim=1)

    with counter.FlopCounterMode(display=False) as counted:
        x = weight(b, s, h)
        for _ in range(model.layers):
            qkv = x @ weight(h, h + 2 * model.kv_width)
            q, k, v = qkv.split([h, model.kv_width, model.kv_width], dim=-1)
            scores = heads(q, model.heads) @ heads(k, model.kv_heads).transpose(-1, -2)
            context = scores.softmax(-1) @ heads(v, model.kv_heads)
            x = context.transpose(1, 2).reshape(b, s, h) @ weight(h, h)
            if model.gated:
                x = (torch.sigmoid(x @ weight(h, model.ffn)) * (x @ weight(h, model.ffn))) @ weight(
                    model.ffn, h
                )
            else:
                x = torch.tanh(x @ weight(h, model.ffn)) @ weight(model.ffn, h)
        (x @ weight(h, model.vocab)).sum().backward()
    assert counted.get_total_flops() == matmul_flops(model, b)
    if not model.gated:
        assert counted.get_total_flops() == pytest.approx(equation_1_corrected(model, b))
        assert counted.get_total_flops() - equation_1(model, b) == pytest.approx(
            head_flops(model, b) / 4
        )
