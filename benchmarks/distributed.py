"""What workers send: bytes a step and the share of communication, tensor layers against dense DDP of the same MLP.

One, two and four processes on this machine, gloo over the loopback. Processes share the cores, so that seconds a step
say nothing about scaling; bytes do, and the share of the time that a worker spends in collectives bounds what faster
links could save. `python benchmarks/distributed.py` prints the table and writes results/distributed.*.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import markdown, publish
from torch import nn

import tnlayers
from decompositions import LowRank
from tnlayers.distributed import prepare

WIDTH, BATCH, RANK = 1024, 128, 8
all_reduce, agree = torch.distributed.all_reduce, tnlayers.optim.rank_adaptive.agree


def mlp(layer: Any) -> nn.Sequential:
    return nn.Sequential(layer(256, WIDTH), nn.ReLU(), layer(WIDTH, WIDTH), nn.ReLU(), layer(WIDTH, 10))


def low_rank(inner: int, outer: int) -> nn.Module:
    return tnlayers.Linear(inner, outer, network=tnlayers.random_network(LowRank, rank=RANK))


class Meter:
    """Bytes handed to collectives and seconds waited for them, called by us or by DDP."""

    def __init__(self) -> None:
        self.bytes, self.seconds, self.sent_again = 0, 0.0, 0

    def agree(self, *args: Any, **options: Any) -> bool:
        """Whether worker 0 had to send its ranks and bases."""
        differed = agree(*args, **options)
        self.sent_again += differed
        return differed

    def reduce(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        """`torch.distributed.all_reduce`, waited for."""
        start = time.perf_counter()
        made = all_reduce(tensor, *args, **options)
        if made is not None:
            made.wait()
        self.seconds += time.perf_counter() - start
        self.bytes += tensor.numel() * tensor.itemsize
        return made

    def hook(self, state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP does with a bucket."""
        flat = bucket.buffer().div_(torch.distributed.get_world_size())
        return self.reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])


def work(worker: int, workers: int, arm: str, steps: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=worker, world_size=workers)
    meter = Meter()
    net = mlp(nn.Linear if arm == "dense" else low_rank)
    model = nn.parallel.DistributedDataParallel(net) if arm == "dense" else prepare(net)
    model.register_comm_hook(None, meter.hook)
    torch.distributed.all_reduce = meter.reduce  # what the library calls
    tnlayers.optim.rank_adaptive.agree = meter.agree
    if arm in ("dense", "AdamW"):
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=1e-3)
    else:
        optimizer = tnlayers.RankAdaptive(net, lr=1e-3, tol=0.1, every=10 if "10" in arm else 1, max_rank=2 * RANK)
    times, shares, sizes, moving = [], [], [], []
    for step in range(steps):
        made = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 256, generator=made), torch.randint(10, (BATCH,), generator=made)
        torch.distributed.barrier()
        meter.bytes, meter.seconds = 0, 0.0
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x.chunk(workers)[worker]), y.chunk(workers)[worker]).backward()
        moving.append(sum(p.numel() * p.itemsize for p in net.parameters() if p.grad is not None))
        optimizer.step()
        times.append(time.perf_counter() - start)
        shares.append(meter.seconds / times[-1])
        sizes.append(meter.bytes)
    if worker == 0:
        row = {
            "arm": arm,
            "workers": workers,
            "parameter_bytes": statistics.median(moving[5:]),
            "bytes": statistics.median(sizes[5:]),
            "share": statistics.median(shares[5:]),
            "seconds": statistics.median(times[5:]),
            "sent_again": meter.sent_again,
        }
        Path(f"{file}.json").write_text(json.dumps(row))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(steps: int = 40) -> list[dict[str, Any]]:
    rows = []
    for arm in ("dense", "AdamW", "RankAdaptive", "RankAdaptive, every=10"):
        for workers in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                file = f"{folder}/group"
                torch.multiprocessing.spawn(work, (workers, arm, steps, file), nprocs=workers)
                rows.append(json.loads(Path(f"{file}.json").read_text()))
            print(rows[-1], file=sys.stderr, flush=True)
    dense = {row["workers"]: row for row in rows if row["arm"] == "dense"}
    head = [
        "optimizer",
        "workers",
        "kB of moving parameters",
        "kB reduced a step",
        "/ parameters",
        "/ dense",
        "ms",
        "waited",
    ]
    lines = [
        [
            "AdamW, dense layers" if row["arm"] == "dense" else row["arm"],
            row["workers"],
            f"{row['parameter_bytes'] / 1e3:.1f}",
            f"{row['bytes'] / 1e3:.1f}",
            f"{row['bytes'] / row['parameter_bytes']:.4f}",
            f"{row['bytes'] / dense[row['workers']]['bytes']:.4f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{100 * row['share']:.0f} %",
        ]
        for row in rows
    ]
    worst = max(row["bytes"] / row["parameter_bytes"] for row in rows if row["arm"] != "dense")
    publish(
        "distributed",
        "Bytes that workers send",
        markdown(head, lines),
        rows,
        [
            f"MLP 256-{WIDTH}-{WIDTH}-10, batch {BATCH} over all workers, LowRank layers that start at rank {RANK}; "
            "gloo on one machine, whose cores the processes share: times are no scaling figure.",
            f"Reach: at most 1.2 times the bytes of the moving parameters; found {worst:.4f}. Beyond them: one number "
            "a Parameter (whether it has a gradient), and 16 bytes by which workers compare their ranks and bases; "
            f"where they differ worker 0 sends its own ({sum(row['sent_again'] for row in rows)} times here).",
        ],
    )
    return rows


if __name__ == "__main__":
    main()
