"""Faults, put in on purpose and counted; the last lines are the table:

    python -m tests.faults [--long] [words for pytest]     a few minutes; --long: every count of bench/robustness.md
"""
import os
import sys
from pathlib import Path

import pytest

words = sys.argv[1:]
os.environ['LMNB_FAULTS'] = 'long' if '--long' in words else 'short'
raise SystemExit(pytest.main([str(Path(__file__).parent), '-q', *(w for w in words if w != '--long')]))
