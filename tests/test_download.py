"""Downloads from a server that drops connections, ignores ranges, changes the file or sends something else."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from data_cases import random_episodes, write_published_d4rl

import benchmark.data.__main__ as command
from benchmark.data import download as module
from benchmark.data import registry
from benchmark.data.access import load_data
from benchmark.data.download import Retries, download
from benchmark.data.files import recorded_digest
from benchmark.data.obtain import fetch
from benchmark.data.registry import dataset_path

CONTENT = np.random.default_rng(0).bytes(3_000_000)
QUICK = Retries(attempts=3, pause=0.001)


class Server(ThreadingHTTPServer):
    """Serves one file; attributes say how badly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.tag: str | None = '"one"'
        self.drops: list[int] = []  # of each answer in turn, after how many bytes the connection is cut
        self.statuses: list[int] = []  # of each answer in turn, 0 for the file
        self.ranges = True
        self.shift = 0  # by which the range sent differs from the one asked for
        self.announced = True
        self.moved = ""
        self.asked: list[str] = []  # the range that each request asked for
        self.sent = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data.hdf5"

    def handle_error(self, request: object, client_address: object) -> None:
        """The client went away."""


class Handler(BaseHTTPRequestHandler):
    """One answer of `Server`."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        wanted = self.headers.get("Range", "")
        server.asked.append(wanted)
        status = server.statuses.pop(0) if server.statuses else 0
        if status:
            self.send_response(status)
            if server.moved:
                self.send_header("Location", server.moved)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        same = self.headers.get("If-Range") in (None, server.tag)
        start = int(wanted[6:-1]) + server.shift if wanted and server.ranges and same else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.announced:
            self.send_header("Content-Length", str(len(server.content) - start))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        body = server.content[start:]
        if server.drops:
            body = body[: server.drops.pop(0)]
        server.sent += len(body)
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def accept(path: Path) -> None:
    assert path.read_bytes() == CONTENT


def get(server: Server, path: Path, check: Callable[[Path], None] = accept, **options: object) -> None:
    download(server.address, path, check, **{"retries": QUICK, **options})  # type: ignore[arg-type]


def refused(server: Server, path: Path, message: str, **options: object) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        get(server, path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_a_file_comes_whole_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    get(server, tmp_path / "a" / "file", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "a" / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "a") == ["file"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_lost_connections_are_continued_byte_by_byte(server: Server, tmp_path: Path) -> None:
    server.drops = [1_000_000, 0, 700_000, 1]
    get(server, tmp_path / "file")
    assert server.sent == len(CONTENT)
    assert server.asked == ["", *["bytes=1000000-"] * 2, "bytes=1700000-", "bytes=1700001-"]


def test_what_has_arrived_is_kept_for_the_next_call(server: Server, tmp_path: Path) -> None:
    server.drops = [500_000, 0, 0]
    refused(server, tmp_path / "file", "failed after 3 attempts .* 500000 bytes are kept in .*; the same command")
    assert set(os.listdir(tmp_path)) == {"file.part", "file.part.json"}
    get(server, tmp_path / "file")
    assert server.sent == len(CONTENT)
    assert os.listdir(tmp_path) == ["file"]


def test_an_interruption_is_continued(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file", progress=interrupt)
    held = (tmp_path / "file.part").stat().st_size
    assert held >= 1_000_000
    get(server, tmp_path / "file")
    assert server.asked[1] == f"bytes={held}-"


def test_a_file_complete_but_for_its_name(server: Server, tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file", check=stop)
    assert not (tmp_path / "file").exists()
    get(server, tmp_path / "file")
    assert server.sent == len(CONTENT)


@pytest.mark.parametrize("announced", [True, False])
def test_a_server_without_ranges_is_asked_for_everything_again(server: Server, tmp_path: Path, announced: bool) -> None:
    server.ranges, server.drops = False, [2_000_000, 1_000_000]
    server.announced = True
    get(server, tmp_path / "file")
    server.announced = announced
    get(server, tmp_path / "again")


def test_a_changed_file_starts_over(server: Server, tmp_path: Path) -> None:
    server.content, server.tag, server.drops = CONTENT[::-1], '"old"', [400_000, 0, 0]
    refused(server, tmp_path / "file", "400000 bytes are kept")
    server.content, server.tag = CONTENT, '"new"'
    get(server, tmp_path / "file")
    assert server.asked[-1] == "bytes=400000-"


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_a_version_that_cannot_be_told_apart_starts_over(server: Server, tmp_path: Path, tag: str | None) -> None:
    server.tag, server.drops = tag, [400_000, 0]
    get(server, tmp_path / "file")
    assert server.asked == ["", "", ""]


def test_a_partial_file_of_another_address_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 100)
    (tmp_path / "file.part.json").write_text(json.dumps({"address": "http://elsewhere", "validator": server.tag}))
    get(server, tmp_path / "file")
    assert server.asked == [""]


def test_a_partial_file_longer_than_the_servers_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * (len(CONTENT) + 1))
    (tmp_path / "file.part.json").write_text(json.dumps({"address": server.address, "validator": server.tag}))
    get(server, tmp_path / "file")


def test_another_range_than_asked_for_is_never_joined(server: Server, tmp_path: Path) -> None:
    server.drops, server.shift = [400_000], 5
    get(server, tmp_path / "file")


def test_wrong_content_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise ValueError("not this one")

    refused(server, tmp_path / "file", "not this one", check=refuse)
    assert not os.listdir(tmp_path)


def test_errors_of_the_server(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    refused(server, tmp_path / "file", "the server answers 404")
    assert len(server.asked) == 1
    server.statuses = [503, 503, 503]
    refused(server, tmp_path / "file", "failed after 3 attempts .the server answers 503")
    server.statuses = [503, 500]
    get(server, tmp_path / "file")


def test_only_http_is_spoken(server: Server, tmp_path: Path) -> None:
    for address in ("file:///etc/hostname", "ftp://127.0.0.1/x", "data.hdf5"):
        with pytest.raises(ValueError, match="must begin with http"):
            download(address, tmp_path / "file", accept)
    server.statuses, server.moved = [302], "file:///etc/hostname"
    refused(server, tmp_path / "file", "the server answers 302")
    server.statuses, server.moved = [302], server.address
    get(server, tmp_path / "file")


def test_no_server_at_all(tmp_path: Path) -> None:
    with Server() as closed:
        address = closed.address
    with pytest.raises(ValueError, match=r"failed after 3 attempts .*refused"):
        download(address, tmp_path / "file", accept, retries=QUICK)


def test_too_much_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2_000_000)
    refused(server, tmp_path / "file", "announces 3000000 bytes; at most 2000000")
    server.announced = False
    refused(server, tmp_path / "file", "sends more than the 2000000 bytes")
    assert (tmp_path / "file.part").stat().st_size <= 2_000_000


def test_a_disk_too_small_is_seen_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: _Usage(1000))
    with pytest.raises(OSError, match="3000000 bytes to come, 1000 free on the disk; 0 bytes are kept"):
        get(server, tmp_path / "file")


@dataclasses.dataclass
class _Usage:
    free: int


def test_a_disk_that_fills_up_keeps_what_arrived(server: Server, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match="file: File too large; 1000000 bytes are kept, the same command") as caught:
            get(server, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None and caught.value.__cause__.errno == errno.EFBIG
    get(server, tmp_path / "file")
    assert server.asked[-1] == "bytes=1000000-"


def test_two_processes_never_write_the_same_file(server: Server, tmp_path: Path) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    arguments = [sys.executable, "-c", code, str(tmp_path / "file.part")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin and other.stdout
        other.stdout.readline()
        refused(server, tmp_path / "file", "another process is downloading it")
        other.stdin.close()
    get(server, tmp_path / "file")


@pytest.fixture
def published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered dataset that the server has."""
    name = "hopper-medium-v2"
    write_published_d4rl(tmp_path / "file.hdf5", random_episodes(observation_dim=11, action_dim=3))
    server.content = (tmp_path / "file.hdf5").read_bytes()
    data = registry.DATASETS[name]
    small = dataclasses.replace(data, address=server.address, episodes=3, steps=17, sha256=None)
    monkeypatch.setitem(registry.DATASETS, name, small)
    return name


def test_a_dataset_is_fetched_and_known_again(server: Server, published: str) -> None:
    server.drops = [1000]
    assert fetch(published) == dataset_path(published)
    assert recorded_digest(published)
    assert len(load_data(published).episodes.lengths) == 3
    fetch(published)
    assert len(server.asked) == 2
    dataset_path(published).unlink()
    server.content += b"\0"  # HDF5 does not mind, the digest does
    with pytest.raises(ValueError, match="as recorded in"):
        fetch(published)
    assert not dataset_path(published).exists()


def test_get_reports_each_file_in_one_line(
    server: Server, published: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["data", "get", published])
        return command.main(), *capsys.readouterr()

    whole, server.content = server.content, b"<html>moved</html>" * 100
    status, _, errors = run()
    assert status == 1
    assert errors.splitlines()[-1].startswith("error: ")
    assert "unreadable HDF5 file" in errors
    assert not [path for path in dataset_path(published).parent.iterdir() if path.name.startswith(published)]
    server.content, server.tag = whole, '"two"'
    status, output, errors = run()
    assert status == 0
    assert f"{published}: 0.0 of 0.0 MB" in errors
    assert f"{dataset_path(published)}: {published}, " in output
