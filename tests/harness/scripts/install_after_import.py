"""install() after Megatron has been imported; then uninstall() leaves no trace."""

import argparse
import os
import sys

import megatron.core.pipeline_parallel.schedules as schedules
import megatron.training.arguments as arguments
import megatron.training.training as training

import megatron_bpipe

NAME = "forward_backward_pipelining_without_interleaving"


os.environ["WORLD_SIZE"] = "8"


def attributes():
    return (
        getattr(schedules, NAME),
        schedules.forward_step,
        schedules.backward_step,
        training.train,
        arguments.add_megatron_arguments,
    )


def parse(*flags: str) -> None:
    sys.argv = ["pretrain_gpt.py", "--pipeline-model-parallel-size", "8", *flags]
    arguments.parse_args()


stock = attributes()
assert megatron_bpipe.status() == {"installed": False, "active": False, "options": None}

megatron_bpipe.install()
megatron_bpipe.install()  # a second time changes nothing
parse()
assert attributes()[:4] == stock[:4], "without --bpipe Megatron stays as it is"
assert not megatron_bpipe.status()["active"]
megatron_bpipe.uninstall()
assert attributes() == stock

megatron_bpipe.install()
parse("--bpipe", "--bpipe-budget", "6", "--bpipe-report", "somewhere")
status = megatron_bpipe.status()
assert status["installed"]
assert status["active"]
assert status["options"].budget == 6
assert getattr(schedules, NAME) is not stock[0]
assert schedules.get_forward_backward_func(pp_size=8, vp_size=None) is getattr(schedules, NAME)
assert training.train is not stock[3]
megatron_bpipe.uninstall()
assert attributes() == stock
assert not megatron_bpipe.status()["installed"]

# Megatron's own --help fails in 0.19.2 (an unescaped % in one of its texts), so ask the parser.
megatron_bpipe.install()
parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
(group,) = [group for group in parser._action_groups if group.title == "bpipe"]
flags = {option for action in group._group_actions for option in action.option_strings}
assert flags == {
    "--bpipe",
    "--bpipe-budget",
    "--bpipe-schedule",
    "--bpipe-transport",
    "--bpipe-placement",
    "--bpipe-report",
    "--bpipe-measure-links",
    "--bpipe-keep-local",
    "--bpipe-rehearsal",
    "--bpipe-parts",
    "--bpipe-balance",
    "--bpipe-memory-limit",
    "--bpipe-recompute",
}
