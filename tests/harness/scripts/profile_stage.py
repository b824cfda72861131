"""Profiles of small models one after the other in one process, and what may not be profiled.

The cases come as JSON: name -> flags, and settings that differ from those below.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_bpipe.estimate.profile import write_profile
from megatron_bpipe.integration.profile.attention import SDPACoreAttention
from megatron_bpipe.integration.profile.flags import read_flags
from megatron_bpipe.integration.profile.group import one_rank_of
from megatron_bpipe.integration.profile.run import run_profile
from megatron_bpipe.integration.profile.settings import ProfileError, Settings


def run_context(core, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = core(*leaves, None, attn_mask_type=AttnMaskType.causal)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def distances(groups: int, layer: int, **config) -> dict[str, list[float]]:
    """Largest difference, and largest value, of output and gradients of both attentions."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        **config,
    )
    torch.manual_seed(3)
    shapes = [(48, 2, 8, 8), (48, 2, groups, 8), (48, 2, groups, 8)]
    tensors = [2 * torch.randn(shape) for shape in shapes]
    found = []
    for kind in (DotProductAttention, SDPACoreAttention):
        core = kind(config, layer, AttnMaskType.causal, "self")
        found.append(run_context(core, tensors))
    pairs = list(zip(*found, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return {
        "apart": [float((a - b).abs().max()) for a, b in pairs],
        "largest": [float(a.abs().max()) for a, _ in pairs],
    }


cases, refused, attention, folder = (*map(json.loads, sys.argv[1:4]), Path(sys.argv[4]))
for name, case in cases.items():
    settings = {"repeats": 3, "warm_up": 1, "peak_flops": 1e11} | case["settings"]
    for key in ("micro_batches", "attention"):
        settings[key] = tuple(settings[key])
    seen = []
    profile = run_profile(Settings(**settings), case["flags"], name, seen.append)
    assert [step.done for step in seen] == list(range(1, seen[-1].total + 1))
    assert seen[-1].profile == profile
    write_profile(profile, folder / f"{name}.json")

answers = {"refused": {}, "attention": {}}
for name, flags in refused.items():
    try:
        run_profile(Settings(micro_batches=(1,), repeats=1, warm_up=0), flags, name)
        answers["refused"][name] = "accepted"
    except ProfileError as error:
        answers["refused"][name] = str(error)
if attention:
    with one_rank_of(read_flags(attention)):
        answers["attention"] = {
            "multi-head": distances(8, 1),
            "grouped": distances(2, 1),
            "scaled by layer": distances(
                8, 3, apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True
            ),
        }
(folder / "answers.json").write_text(json.dumps(answers))
