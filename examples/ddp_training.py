"""Train on several workers at ranks that the training finds; go on where a killed job stopped.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else torch 2.13 may hand restarted workers the addresses of dead ones
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/ddp_training.py

Two lines are new against one process: `prepare`, and the worker's share of the batch. Loss and ranks are those of
one process with the same batches, up to rounding (run it plainly: `python examples/ddp_training.py`). The state is
written every 50 steps; a worker that dies takes the others with it, torchrun starts all again, and they go on from the
last state.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix
from tnlayers.distributed import load_state, prepare, save_state


def data(count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step: points in 64 dimensions whose class depends on three quadratic forms of low rank."""
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(step))
    forms = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(7)) / 8
    return x, torch.einsum("krn,bn->bkr", forms, x).square().sum(-1).argmax(-1)


def build() -> nn.Module:
    """Two layers of small random weights, and a dense head."""
    small = 0.1 / (3 * 64) ** 0.5
    modes = {"row_modes": (8, 8), "col_modes": (16, 8)}
    return nn.Sequential(
        tnlayers.Linear(64, 128, network=tnlayers.random_network(LowRank, rank=1, std=small)),
        nn.ReLU(),
        tnlayers.Linear(128, 64, network=tnlayers.random_network(TTMatrix, rank=1, std=small, **modes)),
        nn.ReLU(),
        nn.Linear(64, 3),
    )


def main(quick: bool = False, folder: str = ".") -> dict[str, tuple[int, ...]]:
    """Train on the workers that torchrun started (or alone), print on worker 0, return the ranks."""
    launched = "WORLD_SIZE" in os.environ
    if launched:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    worker, workers = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if launched and torch.cuda.is_available() else "cpu"
    steps, count = 60 if quick else 600, 256

    torch.manual_seed(0)
    net = build().to(device)
    model = prepare(net) if launched else net  # before the optimizer
    optimizer = tnlayers.RankAdaptive(net, lr=3e-3, tol=0.1, settle=int(0.6 * steps))
    file = Path(folder) / "ddp_training.pt"
    first = load_state(file, model, optimizer)["step"] if file.exists() else 0
    if first and worker == 0:
        print(f"goes on after step {first}")

    for step in range(first, steps):
        x, y = (values.chunk(workers)[worker].to(device) for values in data(count, step))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # gradients are averaged over the workers when it returns
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % (20 if quick else 50) == 0:
            save_state(file, model, optimizer, step=step + 1)

    shipped = tnlayers.compact(net)
    x, y = (values.to(device) for values in data(4000, steps))
    with torch.no_grad():
        right = float((shipped(x).argmax(-1) == y).float().mean())
    if worker == 0:
        file.unlink()
        sent = f", {model.reduction.bytes / 1e3:.1f} kB reduced a step" if launched else ""
        dense = 4 * sum(p.numel() for p in tnlayers.densify(shipped).parameters()) / 1e3
        print(
            f"{workers} workers: accuracy {100 * right:.1f} %, ranks {optimizer.ranks()}{sent} (dense {dense:.0f} kB)"
        )
    if launched:
        dist.destroy_process_group()
    return optimizer.ranks()


if __name__ == "__main__":
    main()
