"""The files of a run directory: what each holds as JSON, and their hashes, which its manifest lists."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hybridlab.errors import RunError
from hybridlab.files import TEMPORARY, content

MANIFEST, ROWS, CONFIG, ENVIRONMENT = "manifest.json", "rows.parquet", "config.json", "environment.json"
UNFINISHED = f"{MANIFEST} was never written: the run is going on or was killed"
LIMIT_BYTES = 2**26  # of a file of JSON


def hashes(path: Path) -> dict[str, str]:
    """The sha256 of every finished file of a run directory, by its name there."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(TEMPORARY))
    return {file.relative_to(path).as_posix(): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inside(path: Path, file: Path) -> bool:
    try:
        return file.resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a name that no file system has
        return False


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `RunError` for the first file of a run that its manifest lists and that is missing or was changed."""
    files = manifest.get("files")
    if (not isinstance(files, dict) or not {"run_id", "status", "reason", "rows"} <= set(manifest)
            or not isinstance(manifest.get("extra", {}), dict)):
        raise RunError(f"{path / MANIFEST} is no manifest", "fields are missing", "restore this file of the run")
    for name, digest in files.items():
        file = path / name
        if not _inside(path, file):
            raise RunError(f"{path / MANIFEST} names {name!r}", "it lies outside the run", "do not trust this run")
        if not file.is_file():
            raise RunError(f"{file} is missing", f"{MANIFEST} lists it", "restore the files of this run")
        if _sha256(file) != digest:
            raise RunError(f"{file} was changed after the run", "its sha256 differs from the manifest",
                           "restore the file; a measured run is never edited")
    if ROWS not in files or CONFIG not in files or ENVIRONMENT not in files:
        raise RunError(f"{path / MANIFEST} does not list {ROWS}, {CONFIG} and {ENVIRONMENT}", "",
                       "restore this file of the run")


def load(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises: RunError, for a link that leaves the run too."""
    if not _inside(path.parent, path):
        raise RunError(f"{path} leads out of the run", "only files inside its directory are read",
                       "do not trust this run")
    try:
        loaded = json.loads(content(path, LIMIT_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read", str(error), "restore this file of the run") from None
    if not isinstance(loaded, dict):
        raise RunError(f"{path} holds {type(loaded).__name__}", "an object was expected", "restore this file")
    return loaded
