"""Models from config.json: published configs and their published sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.parameters import model_parameters
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.planner.inputs.hugging_face import read_config
from tests.planner.inputs.families import (
    DEEPSEEK_V3,
    GPT2_XL,
    GPT_OSS_120B,
    LLAMA_2_70B,
    LLAMA_31_8B,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    PUBLISHED,
    QWEN2_72B,
)


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(tmp_path: Path, name: str) -> None:
    config, billions = PUBLISHED[name]
    model = read_config(write(tmp_path, config), None).model
    assert model_parameters(model) / 1e9 == pytest.approx(billions, rel=1.5e-3)


def test_every_size_arrives(tmp_path: Path) -> None:
    model = read_config(write(tmp_path, LLAMA_2_70B), 2048).model
    assert model == Model(
        name=tmp_path.name, hidden=8192, heads=64, kv_heads=8, layers=80, seq=2048, vocab=32000,
        ffn=28672, gated=True, norm="rmsnorm", bias=False, tied_embeddings=False,
        learned_positions=False, dropout=False,
    )  # fmt: skip
    assert read_config(write(tmp_path, LLAMA_2_70B), None).model.seq == 4096
    assert read_config(write(tmp_path, GPT2_XL), None).model.dropout
    assert read_config(write(tmp_path, QWEN2_72B), 2048).model.qkv_bias
    assert "1000000" in read_config(write(tmp_path, MIXTRAL_8X7B), 2048).extra_flags


@pytest.mark.parametrize("field", [f for f in LLAMA_2_70B if not f.startswith(("num_key", "tie"))])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    config = {name: value for name, value in LLAMA_2_70B.items() if name != field}
    with pytest.raises(EstimateError, match=field):
        read_config(write(tmp_path, config), None)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**LLAMA_2_70B, "model_type": "mamba"}, "model_type is 'mamba'"),
        ({**LLAMA_2_70B, "model_type": "jamba"}, "hybrid layers are not known .* --from-report"),
        ({**LLAMA_2_70B, "model_type": "gemma2"}, "norms after attention"),
        ({**LLAMA_2_70B, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({**LLAMA_2_70B, "attention_bias": True}, "attention_bias is True"),
        ({**LLAMA_2_70B, "mlp_bias": True}, "mlp_bias is True"),
        ({**LLAMA_2_70B, "rope_theta": "much"}, "rope_theta is 'much'"),
        ({**LLAMA_2_70B, "rope_scaling": {"rope_type": "longrope"}}, "rope_scaling is .*longrope"),
        ({**GPT2_XL, "activation_function": "relu"}, "activation_function is 'relu'"),
        ({**GPT2_XL, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({**GPT_OSS_120B, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**LLAMA_2_70B, "hidden_size": "8192"}, "hidden_size is '8192'"),
        ({**LLAMA_2_70B, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({**LLAMA_2_70B, "num_attention_heads": 60}, "8192 is not a multiple of 60 heads"),
        ([1], "is no config"),
        ("{", "is no JSON"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, config: Any, named: str) -> None:
    with pytest.raises(EstimateError, match=named):
        read_config(write(tmp_path, config), None)


def flags_of(folder: Path, config: dict[str, Any], seq: int = 2048) -> str:
    return " ".join(read_config(write(folder, config), seq).extra_flags)


def test_rotations_arrive_from_either_generation_of_fields(tmp_path: Path) -> None:
    assert flags_of(tmp_path, {**LLAMA_2_70B, "rope_theta": None}) == ""
    newer = {**LLAMA_2_70B, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    assert flags_of(tmp_path, newer) == "--rotary-base 500000"
    scaled = flags_of(tmp_path, LLAMA_31_8B)
    assert scaled.startswith("--rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8 ")
    assert "--norm-epsilon 1e-05" in scaled
    assert "--rotary-percent 0.25" in flags_of(
        tmp_path, {**LLAMA_2_70B, "partial_rotary_factor": 0.25}
    )
    assert "--position-embedding-type yarn" in flags_of(tmp_path, GPT_OSS_120B)


def test_routing_arrives(tmp_path: Path) -> None:
    text = flags_of(tmp_path, DEEPSEEK_V3)
    assert "--moe-router-score-function sigmoid --moe-router-enable-expert-bias" in text
    assert "--moe-router-num-groups 8 --moe-router-group-topk 4" in text
    assert "--moe-router-topk-scaling-factor 2.5" in text
    assert "--mscale-all-dim 1" in text


def test_windows_and_layers_that_differ_arrive(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, MISTRAL_7B), 8192).model.window == 4095
    assert read_config(write(tmp_path, MISTRAL_7B), 4096).model.window == 0  # sees all
    oss = read_config(write(tmp_path, GPT_OSS_120B), 8192).model
    assert (oss.window, oss.full_every, oss.head_width) == (127, 2, 64)
    assert read_config(write(tmp_path, DEEPSEEK_V3), 4096).model.moe_layers == "000" + "1" * 58


def test_a_field_that_nobody_knows_is_named(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, {**LLAMA_2_70B, "new_trick": 3}), 2048)
    assert config.notes == ("not read from config.json: new_trick",)
    assert read_config(write(tmp_path, LLAMA_2_70B), 2048).notes == ()


def test_a_position_table_does_not_grow(tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match="n_positions is 1024: a sequence of 2048"):
        read_config(write(tmp_path, GPT2_XL), 2048)
    assert read_config(write(tmp_path, GPT2_XL), 512).model.positions == 1024
