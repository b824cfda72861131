"""Command lines through Megatron's own parser, its checks, and this package's."""

import contextlib
import io
import json
import os
import sys
from typing import Any

import megatron.training.arguments as arguments
from megatron.core.transformer.enums import AttnBackend

import megatron_bpipe


def parsed(argv: list[str], world: int) -> Any:
    """Megatron's arguments for rank 0 of a job of ``world`` ranks, eight a node."""
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(min(world, 8)),
    )
    os.environ.pop("BPIPE_PHYSICAL_RANK", None)
    sys.argv = ["pretrain_gpt.py", *argv]
    megatron_bpipe.install()
    try:
        args = arguments.parse_args()  # unknown flags end it
        with contextlib.redirect_stdout(io.StringIO()):
            return arguments.validate_args(args)
    finally:
        megatron_bpipe.uninstall()


for line in json.loads(sys.argv[1]):
    args = parsed(line["argv"], line["gpus"])
    expected = line["expected"]
    for name, value in expected.items():
        found = getattr(args, name)
        found = found.name if isinstance(found, AttnBackend) else found
        assert found == value, (line, name, found)
