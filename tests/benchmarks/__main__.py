# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark with its defaults: `make benchmarks`. Takes most of an hour on 2 cores."""

import subprocess
import sys
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("bench_*.py")):
    print(f"--- {path.stem}", flush=True)
    subprocess.run([sys.executable, "-m", f"tests.benchmarks.{path.stem}"], check=True)
