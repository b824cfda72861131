#!/usr/bin/env python3
"""The single stages of the re-evaluation's table 5 on this GPU, beside the re-evaluation's A100.

    python benchmarks/table5.py [--models "GPT-3 96B"] [--repeats 5] [--output table5.json]

Ten stages (LLaMA 65B and GPT-3 96B at t = 4, p = 8) through `python -m megatron_bpipe profile`:
one rank's share of Megatron's own layers, without the messages between the four ranks, which the
paper's figures include. Both MFU are of the device's dense bf16 peak. Without Apex the unfused
kernels of --transformer-impl local run. Exit status 77: no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.environment import NO_GPU, environment  # noqa: E402
from megatron_bpipe.estimate.models import model_named  # noqa: E402
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, LAYOUT  # noqa: E402
from megatron_bpipe.estimate.profile import Profile, read_profile  # noqa: E402
from megatron_bpipe.planner.output.megatron_flags import model_flags  # noqa: E402

MODELS = tuple(dict.fromkeys(e.model for e in EXPERIMENTS))
UNFUSED = (
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-gradient-accumulation-fusion", "--no-rope-fusion"),
)


def main() -> int:
    """Profile both models and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return NO_GPU
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            path = Path(folder, "profile.json")
            subprocess.run(command(model, path, arguments.repeats), cwd=ROOT, check=True)
            result["rows"] += rows(model, read_profile(path))
            text = json.dumps(result, indent=1)
            if arguments.output:
                arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def command(model: str, output: Path, repeats: int) -> list[str]:
    """The profile that has all of a model's stages."""
    wanted = [e for e in EXPERIMENTS if e.model == model]
    sizes = ",".join(map(str, sorted({e.micro_batch for e in wanted})))
    attention = ",".join(dict.fromkeys(e.attention for e in wanted))
    words = [sys.executable, "-m", "megatron_bpipe", "profile", "--output", str(output)]
    words += ["--micro-batches", sizes, "--attention", attention, "--repeats", str(repeats), "--"]
    words += [*model_flags(model_named(model)), "--bf16", "--sequence-parallel"]
    words += ["--tensor-model-parallel-size", str(LAYOUT.tp)]
    words += ["--pipeline-model-parallel-size", str(LAYOUT.pp)]
    fused = importlib.util.find_spec("apex") is not None
    return words if fused else [*words, *UNFUSED]


def rows(model: str, profile: Profile) -> list[dict[str, Any]]:
    """Each stage of table 5, with what was measured here."""
    found = []
    for e in EXPERIMENTS:
        if e.model == model:
            row = profile.stage_row(e.micro_batch, e.attention)
            here: dict[str, Any] = {"failure": "not measured"}
            if row is not None and row.forward is not None and row.backward is not None:
                seconds = row.forward.median + row.backward.median
                here = {"mfu": row.mfu, "seconds": seconds, "bytes": row.moved}
            elif row is not None:
                here = {"failure": row.failure}
            what = {"model": model, "micro_batch": e.micro_batch, "attention": e.attention}
            found.append({"id": e.id, **what, "paper_a100_mfu": e.stage_mfu, **here})
    return found


if __name__ == "__main__":
    sys.exit(main())
