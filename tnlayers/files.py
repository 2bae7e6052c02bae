"""Files: written whole or not at all (a temporary name, synced, renamed), and weights read without running code."""

from __future__ import annotations

import os
import pickle
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which checkpoints hold their state dict."""


@contextmanager
def atomic_target(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path in the folder of `path`; what the block leaves there takes the name `path` when the block ends.

    The file is synced before the rename, and the folder after it, so that a reader (and a machine that loses power)
    sees the old file or the new one. On any exception the temporary file is removed and `path` is untouched. A link
    is followed; the permissions of a file that is replaced are kept.

    Args:
        path: the file to write. Its folder must exist; it must not be a folder, nor a device or pipe.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: `path` exists and is no regular file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_target(folder / "x.bin") as temporary:
        ...     _ = temporary.write_bytes(b"abc")
        >>> [p.name for p in folder.iterdir()]
        ['x.bin']
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"write: the folder must exist, expected {target.parent}, got {path}; create it with mkdir"
        )
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device or pipe"
        raise ValueError(f"write: expected the name of a file, got {kind} ({path}); give a file name")
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(6)}.tmp"
    try:
        # Created by us, exclusively, so that the umask decides on its permissions and nobody else owns the name.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        # what writes there may put a file of its own in its place, which nobody else can read (safetensors does)
        temporary.chmod((target.stat().st_mode if target.exists() else mode) & 0o7777)
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync(target.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write the whole file or nothing; text is UTF-8.

    Args:
        path: the file to write; a device or a pipe (`/dev/stdout`) is written to directly, never replaced.
        data: its content.

    Raises:
        TypeError: data is neither bytes nor str.
        FileNotFoundError: the folder is missing.
        ValueError: `path` is a folder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "hello.txt"
        >>> write_atomic(path, "hello")
        >>> path.read_text()
        'hello'
    """
    if not isinstance(data, bytes | str):
        raise TypeError(f"write_atomic: data must be bytes or str, got {type(data).__name__}")
    content = data.encode() if isinstance(data, str) else data
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(content)
        return
    with atomic_target(target) as temporary:
        temporary.write_bytes(content)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def open_weights(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor], bool]]:
    """Names of the tensors in a safetensors file or a state dict, and a function that reads one; no code is run.

    A checkpoint that holds its weights under "state_dict", "model_state_dict", "model" or "module" is unwrapped.

    Returns:
        (names, read, together): `together` says that the tensors lie in memory side by side, so that equal addresses
        mean tied tensors; safetensors are read one by one.

    Raises:
        ValueError: a damaged file, pickled objects, or no tensor in it.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "x.pt"
        >>> torch.save({"w": torch.ones(2, 3)}, path)
        >>> with open_weights(path) as (names, read, together):
        ...     print(names, tuple(read("w").shape), together)
        ['w'] (2, 3) True
    """
    with path.open("rb") as file:
        head = file.read(9)
    size = path.stat().st_size
    if size == 0:
        raise _damaged(path, "it has 0 bytes")
    if path.suffix == ".safetensors" or (head[8:] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size):
        with _open_safetensors(path) as tensors:
            names = sorted(tensors.keys(), key=_natural)
            yield names, lambda name: _read_safetensors(tensors, name, path), False
    else:
        loaded = _load_state_dict(path)
        yield list(loaded), loaded.__getitem__, True


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("inspect_file: safetensors is needed to read this file; pip install safetensors") from error
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if k % 2 else (1, 0, part) for k, part in enumerate(parts)]


def _read_safetensors(file: Any, name: str, path: Path) -> Tensor:
    from safetensors import SafetensorError

    try:
        return file.get_tensor(name)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # a dtype this torch does not have
        raise ValueError(f"inspect_file: tensor {name!r} of {path} cannot be read ({error}); update torch") from error


def _load_state_dict(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        # Mapped, not read: a large checkpoint then costs the memory of one tensor.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "Unsupported class" in text:
            raise ValueError(
                f"inspect_file: expected a state dict, got {path}, which holds pickled Python objects that are not "
                "opened, since that would run their code; save model.state_dict() instead"
            ) from error
        raise _damaged(path, text) from error
    except MemoryError:
        raise
    except Exception as error:  # torch and pickle raise almost any type on a damaged file
        raise _damaged(path, str(error) or type(error).__name__) from error
    for _ in range(3):
        inner = next((loaded[k] for k in WRAPPERS if isinstance(loaded, Mapping) and k in loaded), None)
        if not isinstance(inner, Mapping):
            break
        loaded = inner
    if isinstance(loaded, torch.Tensor):
        return {"tensor": loaded}
    if not isinstance(loaded, Mapping):
        raise ValueError(f"inspect_file: expected a state dict, got a {type(loaded).__name__} in {path}")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        keys = ", ".join(repr(str(k))[:40] for k in list(loaded)[:8])
        raise ValueError(
            f"inspect_file: expected a state dict of tensors, got none in {path} (keys: {keys or 'none'}); "
            "save model.state_dict()"
        )
    return tensors


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _damaged(path: Path, reason: str) -> ValueError:
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", reason).split())[:160]
    return ValueError(
        f"inspect_file: the file is damaged or of another kind, expected safetensors or a torch state dict, "
        f"got {path} ({line}); fetch or save it again"
    )
