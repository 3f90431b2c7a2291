"""Makes `ldm`, `main` and `scripts` importable from the checkout, whatever the working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
