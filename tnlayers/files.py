"""Files that are whole or absent: written under a temporary name, synced, renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        yield temporary
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
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
