"""Switch BPipe on, on a Megatron with a made-up version, or that lacks a symbol or a parameter.

unknown_release.py options|flags VERSION [SYMBOL|SYMBOL:PARAMETER]
"""

import inspect
import os
import sys

import megatron.core.package_info as package_info
import megatron.core.pipeline_parallel.schedules as schedules

import megatron_bpipe

way, version, *lacking = sys.argv[1:]
if version:
    package_info.__version__ = version
for text in lacking:
    name, _, parameter = text.partition(":")
    if parameter:  # as if Megatron had renamed it
        function = getattr(schedules, name)
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.name != parameter]
        function.__signature__ = signature.replace(parameters=kept)
    else:
        delattr(schedules, name)
stock = schedules.forward_backward_pipelining_without_interleaving
if way == "flags":
    import megatron.training.arguments as arguments

    megatron_bpipe.install()
    flags = ["--micro-batch-size", "1", "--pipeline-model-parallel-size", os.environ["WORLD_SIZE"]]
    sys.argv = ["pretrain_gpt.py", *flags, "--bpipe"]
    arguments.parse_args()
else:
    megatron_bpipe.install(megatron_bpipe.Options(bpipe=True))
assert schedules.forward_backward_pipelining_without_interleaving is not stock
megatron_bpipe.uninstall()
assert schedules.forward_backward_pipelining_without_interleaving is stock
