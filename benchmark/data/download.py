"""Download a file over HTTP so that nothing is lost: an interrupted download continues where it stopped.

Bytes go to ``NAME.part``, and what identifies the server's version of the file (``ETag`` or ``Last-Modified``) to
``NAME.part.json``. A later call asks for the rest of the same version (RFC 9110, ``Range`` with ``If-Range``) and
starts over where the server has another one or sends everything. The final name appears only after all checks.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from benchmark.store import read_json, write_json

MAX_BYTES = 1 << 33  # a server that announces or sends more is not believed
TIMEOUT = 60.0  # seconds without a byte before a connection counts as lost
_BLOCK = 1 << 18
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt

Progress = Callable[[int, int | None], None]  # called with the bytes there are, and their final number where known


@dataclass(frozen=True)
class Retries:
    """When to give up on a server that drops connections."""

    attempts: int = 5  # connections lost in a row, none but the first after new bytes
    pause: float = 1.0  # seconds before the second; doubles with each


class _Interrupted(Exception):
    """The connection was lost; another attempt may succeed."""


def download(
    address: str,
    path: Path,
    check: Callable[[Path], None],
    progress: Progress | None = None,
    retries: Retries = Retries(),
) -> None:
    """Download `address` to `path`, continuing what an earlier call left.

    Args:
        check: raises ValueError where the complete file is not the one wanted; it is then removed.
        progress: called now and then.

    Raises:
        ValueError: in one line: no http or https address, refused by the server, still interrupted after all
            attempts, larger than `MAX_BYTES`, or refused by `check`.
        OSError: the file cannot be written, as with a full disk; what has arrived is kept for a later call.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"cannot download {address!r}: the address must begin with http:// or https://")
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(part) as file:
            _fill(address, part, file, progress, retries)
            os.fsync(file.fileno())
            _finish(part, path, check)
    except OSError as error:
        kept = part.stat().st_size if part.exists() else 0
        raise OSError(
            f"{path}: {error.strerror or error}; {kept} bytes are kept, the same command continues"
        ) from error


def _finish(part: Path, path: Path, check: Callable[[Path], None]) -> None:
    try:
        check(part)
    except ValueError:
        _state(part).unlink(missing_ok=True)
        part.unlink()
        raise
    os.replace(part, path)
    _state(part).unlink(missing_ok=True)


@contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """The partial file, open for appending by one process at a time."""
    with part.open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which HDF5 uses itself for `check`
        except BlockingIOError as error:
            raise ValueError(f"{part}: another process is downloading it") from error
        yield file


def _fill(address: str, part: Path, file: IO[bytes], progress: Progress | None, retries: Retries) -> None:
    """Append what is missing, in as many connections as it takes."""
    failures, furthest = 0, file.tell()
    while True:
        try:
            _attempt(address, part, file, progress)
            return
        except _Interrupted as error:
            failures = 1 if file.tell() > furthest else failures + 1
            furthest = max(furthest, file.tell())
            if failures >= retries.attempts:
                kept = f"{file.tell()} bytes are kept in {part}; the same command continues"
                raise ValueError(f"download of {address} failed after {failures} attempts ({error}); {kept}") from error
            time.sleep(retries.pause * 2 ** (failures - 1))


def _attempt(address: str, part: Path, file: IO[bytes], progress: Progress | None) -> None:
    """One connection; returns when the file is complete."""
    validator = _validator(part, address)
    if validator is None:
        _restart(file)  # bytes of two versions could otherwise end up in one file
    start = file.tell()
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": str(validator)}
    try:
        response = _open(urllib.request.Request(address, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "") == f"bytes */{start}":
            return  # nothing lies beyond what is here
        if error.code == 416:
            _restart(file)
        elif error.code not in _TRANSIENT:
            raise ValueError(f"{address}: the server answers {error.code} {' '.join(error.msg.split())}") from error
        raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
    with response:
        _copy(response, file, _accept(response, address, part, file), progress)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    try:
        return _OPENER.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(str(getattr(error, "reason", "") or error or type(error).__name__)) from error


def _accept(response: http.client.HTTPResponse, address: str, part: Path, file: IO[bytes]) -> int | None:
    """Make the partial file fit the answer; returns the size of the whole file where the server says it."""
    start = file.tell()
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            _restart(file)
            raise _Interrupted("the server sent another range than asked for")
        total = None if match[2] == "*" else int(match[2])
    else:
        start = _restart(file)
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        tag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified")
        validator = tag if tag and not tag.startswith("W/") else modified  # a weak tag does not vouch for bytes
        write_json(_state(part), {"address": address, "validator": validator})
    if total is not None:
        if total > MAX_BYTES:
            raise ValueError(f"{address}: announces {total} bytes; at most {MAX_BYTES} are accepted")
        free = shutil.disk_usage(part.parent).free
        if total - start > free:
            raise OSError(f"{total - start} bytes to come, {free} free on the disk")
    return total


def _copy(response: http.client.HTTPResponse, file: IO[bytes], total: int | None, progress: Progress | None) -> None:
    """Append the answer's body."""
    while True:
        try:
            block = response.read(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"connection lost: {error or type(error).__name__}") from error
        if not block:
            break
        if file.tell() + len(block) > (MAX_BYTES if total is None else total):
            raise ValueError(f"{response.url}: sends more than the {total or MAX_BYTES} bytes announced or accepted")
        file.write(block)
        if progress is not None:
            progress(file.tell(), total)
    file.flush()
    if total is not None and file.tell() < total:
        raise _Interrupted(f"connection lost after {file.tell()} of {total} bytes")


def _restart(file: IO[bytes]) -> int:
    """Empty the partial file; returns its length."""
    file.seek(0)
    file.truncate()
    return 0


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _validator(part: Path, address: str) -> str | None:
    """What identifies the version that the partial file belongs to; None where it cannot be continued."""
    try:
        state = read_json(_state(part))
    except ValueError:
        return None
    validator = state.get("validator") if state.get("address") == address else None
    return validator if isinstance(validator, str) and validator.isprintable() else None


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS alone, with the proxies of the environment: no redirection leads to a file or FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


_OPENER = _opener()
