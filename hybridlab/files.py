"""Files read only where reading ends, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".writing-"  # how the name of a file begins that is not whole yet


def opened(path: Path | str) -> BinaryIO:
    """A regular file, open for reading. Raises: OSError, for a pipe or a device too, which could be read for ever."""
    file = open(path, "rb", opener=_opener)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def _opener(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # or the first end of a pipe waits for the other


def content(path: Path | str, limit_bytes: int) -> bytes:
    """What a regular file holds. Raises: OSError as `opened`, and for more than `limit_bytes`."""
    with opened(path) as file:
        found = file.read(limit_bytes + 1)
    if len(found) > limit_bytes:
        raise OSError(errno.EFBIG, f"it holds more than {limit_bytes:,} bytes", str(path))
    return found


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replaces `path` by `content` in one step: after a crash or a full disk it holds the old bytes or the new ones."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open a directory
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
