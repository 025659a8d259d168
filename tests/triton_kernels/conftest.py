"""Kernels run in Triton's interpreter only in a process that was started for it: the switch must be
set before triton is first imported. `test_interpreted.py` starts that process."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `interpreter`

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if INTERPRETED else ["interpreted/*"]
