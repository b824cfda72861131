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

# as published with the models
LLAMA_2_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rope_theta": 1000000.0, "attention_dropout": 0.0,
}  # fmt: skip
GPT2_XL = {
    "model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
    "vocab_size": 50257, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
}  # fmt: skip
QWEN2_72B = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568,
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "vocab_size": 152064, "rope_theta": 1000000.0,
}  # fmt: skip


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_2_70B, 68.98), (MIXTRAL_8X7B, 46.70), (GPT2_XL, 1.558), (QWEN2_72B, 72.7)],
)  # as the model cards count them
def test_parameters_are_those_published(
    tmp_path: Path, config: dict[str, Any], billions: float
) -> None:
    model = read_config(write(tmp_path, config), None).model
    assert model_parameters(model) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_size_arrives(tmp_path: Path) -> None:
    model = read_config(write(tmp_path, LLAMA_2_70B), 2048).model
    assert model == Model(
        name=tmp_path.name, hidden=8192, heads=64, kv_heads=8, layers=80, seq=2048, vocab=32000,
        ffn=28672, gated=True, norm="rmsnorm", bias=False, tied_embeddings=False,
        learned_positions=False, dropout=False,
    )  # fmt: skip
    assert read_config(write(tmp_path, LLAMA_2_70B), None).model.seq == 4096
    assert read_config(write(tmp_path, GPT2_XL), None).model.dropout
    assert "--add-qkv-bias" in read_config(write(tmp_path, QWEN2_72B), 2048).extra_flags
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
        ({**LLAMA_2_70B, "head_dim": 256}, "head_dim is 256"),
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
