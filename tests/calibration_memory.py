"""Peak memory of a calibration, measured in a process of its own: PyTorch's memory is seen by the kernel alone.

python tests/calibration_memory.py 2048 100000 1024
"""

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys, time, torch
from decompositions import ActivationFactor

features, tokens, chunk = map(int, sys.argv[1:])
torch.set_num_threads(1)

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

warm = ActivationFactor(64)
for _ in range(40):
    warm.update(torch.randn(100, 64))
warm.factor
x = torch.randn(chunk, features)
before = status("VmRSS")
start = time.perf_counter()
held = ActivationFactor(features)
for begin in range(0, tokens, chunk):
    held.update(x[: min(chunk, tokens - begin)])
r = held.factor
seconds = time.perf_counter() - start
assert held.count == tokens
print(json.dumps({"extra": status("VmHWM") - before, "square": 4 * features**2, "chunk": x.nbytes, "seconds": seconds}))
"""


def measure(features: int, tokens: int, chunk: int) -> dict[str, float]:
    """Bytes at the peak beside the chunk itself (an upper bound of them), bytes of n^2 and of a chunk, seconds."""
    root = str(Path(__file__).parent.parent)
    # freed blocks go back to the system at once, so that the peak is that of live tensors
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": root}
    command = [sys.executable, "-c", CODE, str(features), str(tokens), str(chunk)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    found = measure(*map(int, sys.argv[1:4]))
    print(f"{found['extra'] / found['square']:.2f} n^2 beside a chunk of {found['chunk'] / found['square']:.2f} n^2")
    print(f"{found['seconds']:.1f} s")
