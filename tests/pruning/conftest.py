"""The tests of pruning find the cases that they share (pruning_cases.py) beside them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
