"""Parse command lines that --bpipe must refuse, or answer with stock; print what was said."""

import contextlib
import io
import json
import os
import sys

import megatron.core.pipeline_parallel.schedules as schedules
import megatron.training.arguments as arguments

import megatron_bpipe

os.environ["WORLD_SIZE"] = "8"
answers = []
for case in json.loads(sys.argv[1]):
    megatron_bpipe.install()
    stock = schedules.forward_step
    if case.get("without"):
        delattr(schedules, "forward_step")
    sys.argv = ["pretrain_gpt.py", "--micro-batch-size", "1", *case["flags"]]
    errors, said = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
        try:
            arguments.parse_args()
        except SystemExit as leaving:
            code = leaving.code
    schedules.forward_step = stock
    answers.append(
        {
            "code": code,
            "error": errors.getvalue(),
            "said": said.getvalue(),
            "active": megatron_bpipe.status()["active"],
        }
    )
    megatron_bpipe.uninstall()
with open(os.environ["ANSWERS"], "w") as file:
    json.dump(answers, file)
