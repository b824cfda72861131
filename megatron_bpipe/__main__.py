"""``python -m megatron_bpipe``: see ``cli.main``."""

import sys

from megatron_bpipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
