"""Makes `ldm` and `main` importable from a checkout that is not installed.

A script that is run as `python scripts/NAME.py` belongs to no package, and Python looks for modules in scripts/ instead
of the root of the checkout: then the script imports this module first. Imported as `scripts.NAME`, or run with
`python -m scripts.NAME`, it needs no help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
