"""One rank of a rehearsal under torchrun: ``rank.py JOB.json``; see tests/harness/rank.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.harness import rank

rank.run(json.loads(Path(sys.argv[1]).read_text()))
