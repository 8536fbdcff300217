"""The tests of checkpoints find the cases that they share (checkpoint_cases.py, layout_cases.py) beside them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
