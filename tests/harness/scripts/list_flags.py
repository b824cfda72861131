"""Write the flags of Megatron's parser with this package's, and the attributes they set."""

import argparse
import json
import sys
from pathlib import Path

import megatron.training.arguments as arguments

from megatron_bpipe.integration.options import add_flags

parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
add_flags(parser)
flags = {option: action.dest for action in parser._actions for option in action.option_strings}
Path(sys.argv[1]).write_text(json.dumps(flags))
