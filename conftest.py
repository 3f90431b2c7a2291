"""Makes `ldm`, `main` and `scripts` importable from the checkout, whatever the working directory."""

import os
import sys
from pathlib import Path

# One thread for each process of the tests: with more, torch's threads wait for one another on a busy machine, and a
# run takes many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
