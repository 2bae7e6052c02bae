"""What `import tnlayers` adds to `import torch`: whole processes, in turn, medians of their ratio.

python benchmarks/imports.py            half a minute
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tnlayers.files import write_atomic
from tnlayers.main_job.config import hardware_facts

RESULTS = Path(__file__).parent / "results"
ALLOWED = 1.15


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main(runs: int) -> int:
    for module in ("torch", "tnlayers"):
        seconds(module)  # byte code and page cache
    pairs = [(seconds("torch"), seconds("tnlayers")) for _ in range(runs)]
    ratio = statistics.median(ours / base for base, ours in pairs)
    rows = {
        "import torch, seconds": statistics.median(base for base, _ in pairs),
        "import tnlayers, seconds": statistics.median(ours for _, ours in pairs),
        "ratio": ratio,
        "allowed": ALLOWED,
        "reached": ratio <= ALLOWED,
        "runs": runs,
        "hardware": hardware_facts(),
    }
    facts = hardware_facts()
    hardware = f"{facts['cpu']}, torch {facts['torch']}"
    text = (
        f"import torch {rows['import torch, seconds']:.3f} s, "
        f"import tnlayers {rows['import tnlayers, seconds']:.3f} s, "
        f"ratio {ratio:.3f} (at most {ALLOWED}): {'reached' if rows['reached'] else 'MISSED'}\n"
        f"median of {runs} interleaved process pairs; {hardware}"
    )
    print(text)
    write_atomic(RESULTS / "imports.json", json.dumps(rows, indent=1) + "\n")
    write_atomic(RESULTS / "imports.md", f"# Import\n\n```\n{text}\n```\n")
    return 0 if rows["reached"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    raise SystemExit(main(parser.parse_args().runs))
