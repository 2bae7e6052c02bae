"""One state of the optimizer on all workers: that of worker 0, where rounding has made any of them differ."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tnlayers.reduction import groups


def agree(tracks: Sequence[Any], generator: torch.Generator | None, *, gauged: bool) -> bool:
    """Make ranks, bases, moments and the generator of worker 0 those of all workers.

    Decisions by a tolerance may differ in the last bit between machines, and singular vectors between two libraries
    more than that. All workers compare 7 bytes of a digest of their states; only where one differs worker 0 sends its
    own, sizes first, then one buffer. Nothing is done for a model that was not prepared, or on one worker.

    Args:
        tracks: networks in training (`layer, digested(), state(), load()`), all windows open.
        generator: of the directions in reserve, if there are any.
        gauged: see `Track.load`.

    Returns:
        Whether the states had differed.
    """
    import torch.distributed as dist

    group = groups.get(tracks[0].layer)
    if group is None or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return False
    own = _digest([track.digested() for track in tracks], generator)
    seen = torch.tensor([own, -own], device=tracks[0].layer.cores[0].device)
    dist.all_reduce(seen, dist.ReduceOp.MAX, group=group)
    if int(seen[0]) == -int(seen[1]):
        return False
    states = [track.state() for track in tracks]
    box: list[Any] = tree_map_only(Tensor, Tensor.cpu, [states, _drawn(generator)])
    dist.broadcast_object_list(box, group_src=0, group=group)
    if generator is not None:
        generator.set_state(box[1])
    for track, state in zip(tracks, box[0], strict=True):
        track.load(state, gauged=gauged)  # worker 0 too: what follows is computed from the same bits everywhere
    return True


def _drawn(generator: torch.Generator | None) -> Any:
    return None if generator is None else generator.get_state()


def _digest(states: Sequence[Sequence[Any]], generator: torch.Generator | None) -> int:
    """A number below 2^56 of all bits: a sum would not see two flipped signs."""
    found = blake2b(digest_size=7)
    for state in (*states, [_drawn(generator)]):
        for value in state:
            if isinstance(value, Tensor):
                value = value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
            found.update(value if isinstance(value, bytes) else repr(value).encode())
    return int.from_bytes(found.digest(), "big")
