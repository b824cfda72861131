#!/usr/bin/env python3
"""Make a dataset for Megatron from text on this machine; nothing is downloaded.

python scripts/examples/prepare_data.py --output runs/data/stdlib
python scripts/examples/prepare_data.py --output runs/data/docs --text docs --max-mib 1
"""

import argparse
import shlex
import sys
import warnings

from megatron_bpipe.integration.text_data import DEFAULT_BYTES, standard_library, write_dataset


def main() -> int:
    """Write the dataset and print the flags to train on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--text",
        metavar="DIR",
        help=f"folder of UTF-8 text files (default: the .py files of {standard_library()})",
    )
    parser.add_argument(
        "--max-mib",
        type=float,
        default=DEFAULT_BYTES / 2**20,
        metavar="N",
        help="take at most N MiB of text (default: %(default)g)",
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # Megatron names each optional package it does not find
    try:
        dataset = write_dataset(
            arguments.output, arguments.text, max_bytes=int(arguments.max_mib * 2**20)
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{dataset.documents} documents, {dataset.tokens} tokens (one a byte)")
    print(f"train on it with: {shlex.join(dataset.flags())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
