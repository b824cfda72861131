"""The command lines that ``plan`` ends with: Megatron's parser takes them, ranks can be placed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.estimate.memory.parameters import model_parameters
from megatron_bpipe.estimate.models import llama
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.placement import ParallelShape, make_report
from megatron_bpipe.planner.inputs.hugging_face import read_config
from megatron_bpipe.planner.output.megatron_flags import model_flags, plan_flags
from tests.harness import Megatron
from tests.planner.inputs.families import DEEPSEEK_V3, MIXTRAL_8X7B, PUBLISHED, QWEN2_72B

CLUSTER = ["--gpu", "H100-80GB", "--gpus", "32", "--global-batch", "128", "--attention", "flash"]
MIXED = """
[[nodes]]
count = 2
gpus = 8
gpu = "A100-80GB"
[[nodes]]
count = 2
gpus = 8
gpu = "H100-80GB"
"""
USERS = shlex.split(
    "--num-layers 48 --hidden-size 6144 --num-attention-heads 48 --seq-length 4096 "
    "--max-position-embeddings 4096 --vocab-size 50304 --bf16 --mock-data --lr 1e-4 "
    "--tokenizer-type NullTokenizer --train-iters 10 --min-lr 1e-5"
)
MODEL = llama("m", hidden=4096, heads=32, layers=32, seq=2048)
RUN = Run(MODEL, Layout(tp=4, pp=8, sequence_parallel=True), 1, 64, "flash")
REST = ["--bf16", "--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "1"]
RUNS = {
    "1F1B": RUN,
    "no attention kernels": replace(RUN, attention="none"),
    "selective": replace(RUN, attention="recompute"),
    "full": replace(RUN, attention="full"),
    "interleaved": replace(RUN, chunks=2),
    "uneven": replace(RUN, partition=(3, 4, 4, 4, 4, 4, 5, 4)),
    "BPipe": replace(RUN, bpipe=True),
    "BPipe, budget": replace(RUN, bpipe=True, budget=6, partition=(3, 4, 4, 4, 4, 4, 5, 4)),
    "interleaved BPipe": replace(RUN, bpipe=True, chunks=2, budget=9.5),
    "host offload": replace(RUN, host=True, budget=6),
    "ZB-H1": replace(RUN, schedule="zb-h1"),
    "BPipe on ZB-H1": replace(RUN, schedule="zb-h1", bpipe=True, budget=6),
    "V-Half": replace(RUN, schedule="v-half", chunks=2),
    "V-Min, uneven": replace(
        RUN, schedule="v-min", chunks=2, partition=(2, 2, 2, 2, 2, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1)
    ),
    "V-ZB, replicas": replace(
        RUN,
        schedule="v-zb",
        chunks=2,
        layout=Layout(tp=2, pp=4, dp=4, sequence_parallel=True),
        distributed_optimizer=True,
    ),
    "PipeDream-2BW": replace(RUN, schedule="pipedream-2bw", layout=Layout(tp=1, pp=4, dp=2)),
    "replicas": replace(
        RUN, layout=Layout(tp=2, pp=4, dp=4, sequence_parallel=True), distributed_optimizer=True
    ),
    "experts": replace(
        RUN,
        model=replace(MODEL, experts=8, experts_per_token=2),
        layout=Layout(tp=1, pp=4, dp=8, ep=8),
    ),
    "BPipe, whole experts": replace(
        RUN,
        model=replace(MODEL, experts=8, experts_per_token=2),
        layout=Layout(tp=4, pp=8, ep=4, etp=1, sequence_parallel=True),
        bpipe=True,
    ),
}


def parsed_as_planned(megatron: Megatron, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        layout = case.pop("layout")
        case["gpus"] = layout.gpus
        case["expected"] |= {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "data_parallel_size": layout.dp,
            "expert_model_parallel_size": layout.ep,
            "sequence_parallel": layout.sequence_parallel,
        }
        if layout.etp in (None, layout.tp):
            shape = ParallelShape(tp=layout.tp, dp=layout.dp, pp=layout.pp, ep=layout.ep)
            make_report(shape, 8, "pair-adjacent")  # raises where ranks cannot be placed
    result = megatron.script("parse_command_lines.py", [json.dumps(cases)], world=1)
    assert result.ok, result.logs


def after_script(words: list[str]) -> list[str]:
    """Variables before torchrun, and the script's flags."""
    variables = words[: words.index("torchrun")]
    return [*variables, *words[words.index("pretrain_gpt.py") + 1 :]]


def test_megatron_takes_every_way_to_run(megatron: Megatron) -> None:
    cases: list[dict[str, Any]] = []
    for run in RUNS.values():
        expected = {
            "num_layers": run.model.layers,
            "micro_batch_size": run.micro_batch,
            "global_batch_size": run.global_batch,
            "bpipe": run.bpipe or run.host,
            "bpipe_budget": run.budget,
            "bpipe_transport": "host" if run.host else "auto",
            "bpipe_placement": "pair-adjacent" if run.layout.etp is None else "megatron",
            "bpipe_schedule": run.schedule,
            "use_distributed_optimizer": run.distributed_optimizer,
            "recompute_granularity": {"recompute": "selective", "full": "full"}.get(run.attention),
            "virtual_pipeline_model_parallel_size": run.chunks if run.chunks > 1 else None,
        }
        argv = ["CUDA_DEVICE_MAX_CONNECTIONS=1", *model_flags(run.model), *REST, *plan_flags(run)]
        cases.append({"argv": argv, "layout": run.layout, "expected": expected})
    parsed_as_planned(megatron, cases)


def test_megatron_takes_what_the_command_ends_with(
    megatron: Megatron, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(name: str, content: dict[str, Any]) -> list[str]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return ["--hf-config", str(path), "--seq-length", "4096"]

    (tmp_path / "mixed.toml").write_text(MIXED)
    mixed = ["--cluster", str(tmp_path / "mixed.toml"), "--global-batch", "128"]
    fixed = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"]
    questions = {
        "qwen": [*config("q", QWEN2_72B), *CLUSTER, "--", *fixed[:2]],
        "mixtral": [*config("m", MIXTRAL_8X7B), *CLUSTER, "--", *fixed],
        "user's flags": [*CLUSTER, "--", *USERS, *fixed],
        "user's BPipe": [*CLUSTER, "--even-layers", "--", *USERS, *fixed, "--bpipe"],
        "two kinds": ["--model", "LLaMA 65B", "--attention", "flash", *mixed],
    }
    cases: list[dict[str, Any]] = []
    for name, words in questions.items():
        assert main(["plan", "--json", *words]) == 0, name
        result = json.loads(capsys.readouterr()[0])
        argv = shlex.split(result["command"].splitlines()[-1])
        argv = after_script(argv)
        best = next(plan for plan in result["plans"] if plan["fits"] == "yes")
        expected = {
            "num_layers": sum(best["partition"]),
            "hidden_size": result["model"]["hidden"],
            "ffn_hidden_size": result["model"]["ffn"],
            "micro_batch_size": best["micro_batch"],
            "global_batch_size": 128,
            "bpipe": name == "user's BPipe",
        }
        cases.append({"argv": argv, "layout": Layout(**best["layout"]), "expected": expected})
    parsed_as_planned(megatron, cases)


SHORTER: dict[str, Any] = {
    "num_hidden_layers": 8,
    "n_layer": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
}
FEWER = {"n_routed_experts": 16, "num_local_experts": 16, "num_experts": 16}


JUDGED = (
    *("llama-2-70b", "llama-3.1-8b", "mistral-7b", "mixtral-8x7b", "qwen2-72b"),
    *("qwen2-57b-a14b", "qwen3-32b", "qwen3-235b-a22b", "deepseek-v2-lite"),
)
FAMILIES = {name: config for name, (config, _) in PUBLISHED.items()}
FAMILIES["deepseek-v3 with MTP"] = DEEPSEEK_V3
REST_OF_THEM = tuple(name for name in FAMILIES if name not in JUDGED)


def shortened(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with eight layers and sixteen experts, so that building it is quick."""
    small = {name: value for name, value in (SHORTER | FEWER).items() if name in config}
    return {**config, **small}


@pytest.mark.parametrize(
    "families", [JUDGED, pytest.param(REST_OF_THEM, marks=pytest.mark.long)], ids=["some", "others"]
)
def test_families_from_config_to_megatrons_parser_and_builder(
    megatron: Megatron,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    families: tuple[str, ...],
) -> None:
    """The command of each is taken, and Megatron's model has the parameters that were planned."""
    cases: list[dict[str, Any]] = []
    own = [*REST, "--lr", "1e-4", "--tensor-model-parallel-size", "1", "--micro-batch-size", "1"]
    own += ["--pipeline-model-parallel-size", "2"]
    for name in families:
        config = FAMILIES[name]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(shortened(config)))
        words = ["--hf-config", str(path), "--seq-length", "1024", "--attention", "flash"]
        words += ["--gpu", "H200", "--gpus", "16", "--global-batch", "16", "--even-layers"]
        assert main(["plan", "--json", *words, "--", *own]) == 0, name
        result = json.loads(capsys.readouterr()[0])
        assert result["command"], name
        argv = shlex.split(result["command"].splitlines()[-1])
        argv = after_script(argv)
        model = read_config(path, 1024).model
        cases.append(
            {
                "argv": argv,
                "layout": Layout(**result["plans"][0]["layout"]),
                "expected": {
                    "num_layers": 8,
                    "hidden_size": model.hidden,
                    "kv_channels": model.hidden // model.heads if model.mla else model.head_width,
                    "num_experts": model.experts or None,
                    "mtp_num_layers": model.mtp or None,
                },
                # latent attention and learned sinks need Transformer Engine to be built
                "parameters": 0 if model.mla or model.sinks else model_parameters(model),
            }
        )
    parsed_as_planned(megatron, cases)
