"""Files that are written whole or not at all."""

import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file that has its name only when all of it is there: a crash leaves the old file or none.

    Args:
        path: the file; its folder exists.
        content: what it holds.
        sync: whether to wait until it is on the disk, so that not even a power cut leaves half of it. Thousands of
            files in a folder that is not complete yet do without, and `workers.finish` waits for all.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; numbers that are not finite become null, JSON has none."""
    write_whole(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def compress(path: Path) -> None:
    """Compress what is in a zip file: Keras stores weights in one as they are, a tenth larger."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in stored.infolist():
            target.writestr(part, stored.read(part), zipfile.ZIP_DEFLATED)
    write_whole(path, packed.getvalue())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
