"""Write the dataset that test runs train on, and Megatron's flags for it into a file beside it."""

import json
import sys
from pathlib import Path

from scripts.examples.prepare_data import write_dataset

text = write_dataset(sys.argv[1], max_bytes=512 * 2**10)
Path(f"{sys.argv[1]}.json").write_text(json.dumps(text.flags()))
