"""Launching: ranks, Slurm, container image."""

import argparse

from megatron_bpipe.integration.options import add_flags

_parser = argparse.ArgumentParser()
add_flags(_parser)
PLACEMENT_FLAG = "--bpipe-placement" in _parser._option_string_actions
