"""Download the twelve archives of OASIS-1; a download that was broken off goes on where it stopped.

An archive grows as `<name>.partial`, beside `<name>.partial.json`, which says of which file on the server it is a part.
It gets its name when all of it has been read and its checksum is right, and then `<name>.json`, which says how large it
was: an archive without that, or of another size, came here in another way, and is read first. No library does this:
pooch starts again from zero, nilearn and huggingface_hub join the parts of two files if the server's file changes in
between, and pypdl and parfive, when killed, leave part of a file under its final name.
"""

import gzip
import json
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import requests
import urllib3
from tqdm import tqdm

from oasis_vq.files import write_json

BASE_URL = "https://download.nrg.wustl.edu/data"
HOME_PAGE = "https://sites.wustl.edu/oasisbrains/"
DISCS = range(1, 13)
CHUNK = 65536  # bytes written at a time
TIMEOUT = 30.0  # seconds to connect, and without a byte
NUM_RETRIES = 5  # in a row without a byte more than ever before
FIRST_WAIT = 1.0  # seconds before the first retry, twice as many before each further one
BYTES = {"unit": "B", "unit_scale": True}  # of progress bars
TERMS = f"""\
OASIS-1 may be used by those who keep the OASIS Data Use Agreement. In short:

  - Ask for access first, with the form at {HOME_PAGE}, and read the agreement there.
  - Use the data for research and teaching, not commercially. Keep them where only those who work with them can
    read them, and do not pass them on: whoever wants them asks for access as well.
  - Do not try to find out who the participants are, or to contact them; recognising and rendering faces is part of it.
  - Whatever you present, print or publish that the data helped with says: "Data were provided [in part] by OASIS-1:
    Cross-Sectional: Principal Investigators: D. Marcus, R. Buckner, J. Csernansky, J. Morris; P50 AG05681,
    P01 AG03991, P01 AG026276, R01 AG021910, P20 MH071616, U24 RR021382."
  - It cites Marcus et al. 2007, Journal of Cognitive Neuroscience 19(9), 1498-1507, doi:10.1162/jocn.2007.19.9.1498.
  - Say what you use the data for if the Knight Alzheimer Disease Research Center asks.

This summary does not replace the agreement, which binds you and may have changed since this was written.
"""


def confirm_terms(accept: bool = False) -> None:
    """Print the terms of OASIS-1 in short, and ask on the terminal whether they are accepted.

    Args:
        accept: whether they are accepted already; then nothing is asked.

    Raises:
        ValueError: the answer is not yes, or there is nobody to ask.
    """
    print(TERMS)
    if accept:
        return
    try:
        if not (sys.stdin and sys.stdin.isatty()):
            raise EOFError
        answer = input("Type yes to accept: ")
    except EOFError:
        raise ValueError(
            "Nobody said that the terms of OASIS-1 are accepted. If they are, pass --accept-terms."
        ) from None
    if answer.strip().lower() != "yes":
        raise ValueError(f"Without yes to the terms of OASIS-1 nothing is downloaded. Received: {answer!r}.")


def download_oasis1(
    folder: str | os.PathLike,
    *,
    discs: Iterable[int] = DISCS,
    base_url: str = BASE_URL,
    progress: bool = True,
) -> list[Path]:
    """Download archives of OASIS-1, about 1.5 GB each; whole ones are kept, one that was broken off goes on.

    An archive that another program left under the name is kept as well, if it is whole.

    One call at a time for a folder: two would write into the same files.

    Args:
        folder: where `oasis_cross-sectional_disc<number>.tar.gz` go; made if missing.
        discs: numbers in 1 .. 12; one that comes twice counts once.
        base_url: address of the archives on the server, without their names.
        progress: whether to show progress bars.

    Returns:
        The archives, in the order of `discs`.

    Raises:
        ValueError: a disc that there is not, or none at all.
        OSError: the server does not have an archive, the connection keeps breaking off, the disk is too small, or an
            archive is damaged. After each of these the same call goes on from what is there; only a damaged archive
            that another program left is to be removed before.
    """
    discs, folder = list(dict.fromkeys(discs)), Path(folder)
    if not discs or set(discs) - set(DISCS):
        raise ValueError(f"The discs of OASIS-1 are {DISCS[0]} to {DISCS[-1]}. Received: {discs}.")
    folder.mkdir(parents=True, exist_ok=True)
    archives = [folder / f"oasis_cross-sectional_disc{disc}.tar.gz" for disc in discs]
    for archive in archives:
        partial, checked = (archive.with_name(f"{archive.name}.{suffix}") for suffix in ("partial", "json"))
        if archive.exists():
            if _read_json(checked).get("size") == _size(archive):
                continue
            if damage := _find_damage(archive, progress):
                raise OSError(f"{archive} is damaged ({damage}). Remove it, then run download again.")
        else:
            _fetch(f"{base_url}/{archive.name}", partial, progress)
            if damage := _find_damage(partial, progress):
                partial.unlink()
                _record(partial).unlink(missing_ok=True)
                raise OSError(f"{archive.name} came damaged ({damage}) and was removed. The same command starts anew.")
            with partial.open("ab") as file:
                os.fsync(file.fileno())  # a power cut must not leave the name without the bytes
            partial.replace(archive)
        write_json(checked, {"size": _size(archive)})
        _record(partial).unlink(missing_ok=True)
    print(f"Next: python -m oasis_vq prepare {folder} --out data/oasis")
    return archives


def _record(partial: Path) -> Path:
    """Return where it is written of which file, with which size in bytes, the partial one is a part."""
    return partial.with_name(f"{partial.name}.json")


def _read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file says, or nothing where there is none to be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _size(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _fetch(url: str, partial: Path, progress: bool) -> None:
    """Complete the partial file, and try again when the connection breaks off."""
    failures, farthest = 0, _size(partial)
    while True:
        try:
            if _request(url, partial, progress):
                return
            reason = "the answer was too short"
        except (requests.ConnectionError, requests.Timeout, requests.HTTPError, urllib3.exceptions.HTTPError) as error:
            cause = error.args[0] if error.args else error
            reason = getattr(cause, "reason", cause)
        there = _size(partial)
        # Farther than ever, not than before: a server that cannot continue would be asked for its start for ever.
        failures, farthest = (1, there) if there > farthest else (failures + 1, farthest)
        if failures > NUM_RETRIES:
            raise ConnectionError(
                f"{url} failed {failures} times in a row: {reason}. {there / 1e6:,.1f} MB are in {partial}; "
                "the same command goes on from there."
            )
        wait = FIRST_WAIT * 2 ** (failures - 1)
        print(f"{partial.stem}: stopped at {there / 1e6:,.1f} MB ({reason}), going on in {wait:g} s")
        time.sleep(wait)


def _request(url: str, partial: Path, progress: bool) -> bool:
    """Ask once for what is missing and write what comes; return whether the partial file is complete."""
    there, known = _known(partial)
    if there and there == known["size"]:
        return True
    headers = {"Accept-Encoding": "identity"}
    if there:  # If-Range: the whole file instead, if it is not the one that this is a part of; None is not sent
        headers |= {"Range": f"bytes={there}-", "If-Range": known["validator"]}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, (start, found) = response.status_code, _describe(response)
        if status in (408, 429) or status >= 500:
            response.raise_for_status()  # these pass
        kind = response.headers.get("Content-Type", "")
        if status not in (200, 206, 416) or (status == 200 and kind.startswith("text/")):  # say, a page to log in
            raise OSError(f"{url}: no archive ({status} {response.reason}, {kind}). See {HOME_PAGE} for where it is.")
        if status == 416 and there == found["size"]:
            return True
        if status == 200:
            if there:
                why = "the server cannot continue a download" if found == known else "it has changed on the server"
                print(f"{partial.stem}: {why}, starting again from zero")
            partial.unlink(missing_ok=True)  # before the record changes: it is always that of the bytes
            write_json(_record(partial), found)
        elif (start, found["size"]) != (there, known["size"]) or found["validator"] not in (None, known["validator"]):
            partial.unlink(missing_ok=True)
            raise requests.ConnectionError("the server sent another part, or a part of another file")
        _write(response, partial, found["size"], progress)
    return found["size"] in (None, _size(partial))


def _known(partial: Path) -> tuple[int, dict[str, Any]]:
    """Return how many bytes are there to go on from, and validator and size of the file that they are a part of."""
    known = _read_json(_record(partial))
    return (_size(partial), known) if known else (0, {"validator": None, "size": None})


def _describe(response: requests.Response) -> tuple[int, dict[str, Any]]:
    """Return the byte at which an answer starts, and validator and size of the whole file where they are told."""
    etag = response.headers.get("ETag", "")
    # A weak ETag means "much the same file": not enough to join two parts (RFC 9110, section 13.1.5).
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    start, size = (span[1] or 0, span[2]) if span else (0, response.headers.get("Content-Length"))
    return int(start), {"validator": validator, "size": int(size) if size else None}


def _write(response: requests.Response, partial: Path, size: int | None, progress: bool) -> None:
    """Append what comes to the partial file, if there is room for a file of `size` bytes."""
    there, free = _size(partial), shutil.disk_usage(partial.parent).free
    if size and size - there > free:
        needed = f"{partial.stem} needs {(size - there) / 1e6:,.1f} MB more"
        raise OSError(f"{needed}, {partial.parent} has {free / 1e6:,.1f} MB free.")
    bar = tqdm(desc=partial.stem, initial=there, total=size, disable=not progress, **BYTES)
    with bar, partial.open("ab") as file:
        # Not decoded: some servers call a .tar.gz a .tar in gzip encoding.
        for chunk in response.raw.stream(CHUNK, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))


def _find_damage(archive: Path, progress: bool) -> str | None:
    """Read an archive to its end, where gzip's checksum is, and every tar header; return what is wrong, or None."""
    name = f"checking {archive.name.removesuffix('.partial')}"
    try:
        with (
            archive.open("rb") as raw,
            tqdm.wrapattr(raw, "read", desc=name, total=_size(archive), disable=not progress, **BYTES) as file,
            gzip.GzipFile(fileobj=file) as stream,
            tarfile.open(fileobj=stream, mode="r|") as members,
        ):
            for _ in members:
                pass
            while stream.read(CHUNK):
                pass
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        return str(error)
    return None
