"""Promises about leases: one holder, whatever dies, freezes, or writes from another machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from benchmark.launch import lease as lease_module
from benchmark.launch.lease import STALE_SECONDS, Lease, LeaseLost, RunBusy, held

CONTEXT = multiprocessing.get_context("forkserver")
ELSEWHERE = {"token": "other", "host": "another-machine", "pid": 1, "job_id": "7_0"}


def hold(path: Path) -> None:
    """Another process: hold the lease until told to wake, then write down whether it may still write.

    They talk through files: a frozen process would keep the locks of anything else.
    """
    with Lease(path) as lease:
        (path.parent / "ready").touch()
        while not (path.parent / "wake").exists():
            time.sleep(0.02)
        try:
            lease.check()
            verdict = "holds"
        except LeaseLost:
            verdict = "lost"
        (path.parent / "verdict").write_text(verdict)


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lease of `tmp_path`/run.lock."""
    process = CONTEXT.Process(target=hold, args=(tmp_path / "run.lock",))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    yield process
    process.kill()
    process.join()


def age(path: Path, seconds: float) -> None:
    """Set the last heartbeat back."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_living_holder_is_busy_and_named(tmp_path: Path, holder) -> None:
    assert held(tmp_path / "run.lock")
    with pytest.raises(RunBusy, match=f"process {holder.pid} on "):
        Lease(tmp_path / "run.lock").acquire()


def test_what_a_killed_holder_leaves_is_taken_at_once(tmp_path: Path, holder) -> None:
    holder.kill()
    holder.join()
    assert (tmp_path / "run.lock").stat().st_size > 0
    assert not held(tmp_path / "run.lock")
    with Lease(tmp_path / "run.lock") as lease:
        lease.check()


def test_a_frozen_holder_is_replaced_and_knows_it_when_it_wakes(tmp_path: Path, holder) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    age(tmp_path / "run.lock", STALE_SECONDS + 5)
    with Lease(tmp_path / "run.lock") as lease:
        (tmp_path / "wake").touch()
        os.kill(holder.pid, signal.SIGCONT)
        holder.join(60)
        assert (tmp_path / "verdict").read_text() == "lost"
        lease.check()  # the other's release took nothing away
        assert held(tmp_path / "run.lock")


@pytest.mark.parametrize("kernel_locks", [True, False])
def test_a_holder_on_another_machine_counts_until_its_heartbeat_is_old(
    kernel_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_locks:
        monkeypatch.setattr(lease_module, "_lock", lambda file: None)
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(ELSEWHERE))
    assert held(path)
    with pytest.raises(RunBusy, match="another-machine, job 7_0"):
        Lease(path).acquire()
    age(path, STALE_SECONDS + 5)
    assert not held(path)
    with Lease(path) as lease:
        lease.check()


@pytest.mark.parametrize("kernel_locks", [True, False])
def test_a_lease_given_back_is_free(kernel_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel_locks:
        monkeypatch.setattr(lease_module, "_lock", lambda file: None)
    for _ in range(2):
        with Lease(tmp_path / "run.lock") as lease:
            lease.check()
        with pytest.raises(LeaseLost):
            lease.check()
        assert not held(tmp_path / "run.lock")


def test_without_kernel_locks_the_last_of_two_takers_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_lock", lambda file: None)
    other = json.dumps(ELSEWHERE)
    monkeypatch.setattr(lease_module.time, "sleep", lambda seconds: (tmp_path / "run.lock").write_text(other))
    with pytest.raises(RunBusy, match="same moment"):
        Lease(tmp_path / "run.lock").acquire()
    assert (tmp_path / "run.lock").read_text() == other


def test_the_heartbeat_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    with Lease(tmp_path / "run.lock"):
        age(tmp_path / "run.lock", 1000.0)
        deadline = time.monotonic() + 20
        while time.time() - (tmp_path / "run.lock").stat().st_mtime > 100:
            assert time.monotonic() < deadline
            time.sleep(0.02)
