"""Several processes for the tests of `tnlayers.distributed`: gloo on this machine, results by files."""

import datetime
import hashlib
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker

multiprocessing.set_forkserver_preload(["workers", "pytest", "torch.distributed.fsdp", "torch.distributed.tensor"])


def launch(scenario: Callable[..., Any], workers: int, folder: Path, *args: Any) -> list[Any]:
    """Run `scenario(worker, *args)` in each of several processes; what they return, which is plain data and tensors."""
    folder = Path(folder) / f"{scenario.__name__}-{workers}"
    folder.mkdir()
    arguments = (scenario, workers, folder, args)
    torch.multiprocessing.start_processes(_work, arguments, nprocs=workers, start_method="forkserver")
    return [torch.load(folder / f"{worker}.pt", weights_only=True) for worker in range(workers)]


def _work(worker: int, scenario: Callable[..., Any], workers: int, folder: Path, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
    torch.set_num_threads(1)
    torch.manual_seed(worker)  # workers start apart: what agrees is the library's doing
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/group", rank=worker, world_size=workers, timeout=datetime.timedelta(seconds=60)
    )
    result = scenario(worker, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.save(result, folder / f"{worker}.pt")


def digest(tensors: Any) -> str:
    """All bits of some tensors, and their shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr(tuple(tensor.shape)).encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def cores_of(model: nn.Module) -> list[Tensor]:
    """Cores of all layers."""
    return [core for _, layer in tnlayers.surgery.network_layers(model) for core in layer.cores]


def small_net(dtype: torch.dtype = torch.float32, *, seed: int | None = None, head: bool = True) -> nn.Sequential:
    """Images (1, 8, 8) -> 6 numbers: a convolution, a train, a matrix; biases and a dense head."""
    if seed is not None:
        torch.manual_seed(seed)
    random = tnlayers.random_network
    parts: list[nn.Module] = [
        tnlayers.Conv2d(1, 8, 3, network=random(Tucker, rank=2), dtype=dtype),
        nn.Tanh(),
        nn.Flatten(),
        tnlayers.Linear(288, 24, network=random(TTMatrix, rank=2), dtype=dtype),
        nn.Tanh(),
        tnlayers.Linear(24, 16, network=random(LowRank, rank=2), dtype=dtype),
    ]
    return nn.Sequential(*parts, nn.Tanh(), nn.Linear(16, 6, dtype=dtype)) if head else nn.Sequential(*parts)


def batch(step: int, rows: int = 16, dtype: torch.dtype = torch.float32, out: int = 6) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same for whoever asks: what a hidden net says."""
    made = torch.Generator().manual_seed(1000 + step)
    hidden = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 1, 8, 8, generator=made, dtype=torch.float64)
    w = torch.randn(64, out, generator=hidden, dtype=torch.float64) / 4
    return x.to(dtype), torch.tanh(x.flatten(1) @ w).to(dtype)


def part(values: Tensor, worker: int) -> Tensor:
    """A worker's equal share of a global batch."""
    return values.chunk(torch.distributed.get_world_size())[worker]


def all_equal(values: Any) -> bool:
    """Whether all workers say the same."""
    return all(value == values[0] for value in values)
