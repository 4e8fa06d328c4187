"""Promises about what goes wrong on the way: damaged files, full disks, crashes, signals, time limits."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import toy_spec
from test_runs import results, rows

from benchmark import provenance, store
from benchmark.finetune import EXPLODED_Q, Trainer
from benchmark.launch import lease, local
from benchmark.launch.attempt import Stop
from benchmark.launch.execute import execute
from benchmark.launch.lease import LeaseLost
from benchmark.launch.local import Pool, last_line
from benchmark.plan import PlannedRun, plan_runs, prepare
from benchmark.store import RunPaths, load_latest_checkpoint, read_json, run_paths, write_json

LONG = {"iterations": 4000}  # never done while a test looks on


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def iteration(paths: RunPaths) -> int:
    return read_json(paths.status).get("iteration", 0) if paths.status.exists() else 0


def half_done(run: PlannedRun) -> None:
    """Two checkpoints, after iterations 2 and 3."""
    trainer = Trainer(run.spec)
    for _ in range(3):
        trainer.advance()
    trainer.save(run.paths)
    trainer.advance()
    trainer.save(run.paths)


def test_a_checkpoint_cut_anywhere_is_noticed_and_the_one_before_is_used(prepared) -> None:
    run = prepared("idql")
    half_done(run)
    whole = run.paths.checkpoint.read_bytes()
    before = store.load_checkpoint(run.paths.previous_checkpoint)["iteration"]
    for percent in range(100):
        run.paths.checkpoint.write_bytes(whole[: len(whole) * percent // 100])
        for own in (False, True):  # who only reads leaves it
            assert run.paths.checkpoint.exists()
            state = load_latest_checkpoint(run.paths, own)
            assert state is not None and state["iteration"] == before
        assert not run.paths.checkpoint.exists()  # so that it never takes the place of the good one
    run.paths.checkpoint.write_bytes(whole)
    state = load_latest_checkpoint(run.paths)
    assert state is not None and state["iteration"] == before + 1


def test_a_flipped_bit_is_noticed(prepared) -> None:
    run = prepared("idql")
    half_done(run)
    content = bytearray(run.paths.checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    run.paths.checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="unreadable checkpoint"):
        store.load_checkpoint(run.paths.checkpoint)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(prepared) -> None:
    run, whole = prepared("idql"), prepared("idql", "whole")
    execute(whole.paths.root)
    half_done(run)
    run.paths.checkpoint.write_bytes(run.paths.checkpoint.read_bytes()[:-100])
    assert execute(run.paths.root) == "done"
    assert results(run.paths) == results(whole.paths)
    assert not run.paths.previous_checkpoint.exists()


def test_a_damaged_provenance_does_not_keep_a_run_from_going_on(prepared) -> None:
    run, whole = prepared("idql"), prepared("idql", "whole")
    execute(whole.paths.root)
    half_done(run)
    run.paths.provenance.write_text("{")
    assert execute(run.paths.root) == "done"
    assert results(run.paths) == results(whole.paths)
    assert "damaged" in read_json(run.paths.provenance)["note"]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size; skips where it cannot be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("file", ["checkpoint.pt", "curve.csv", "metrics.csv", "evaluations.csv", "status.json"])
def test_a_full_disk_is_a_state_and_the_run_goes_on_when_there_is_space(
    file: str, prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"evaluate_rules": True}
    whole = prepared("idql", "whole", loop=rules)
    execute(whole.paths.root)
    with small_disk(tmp_path / "disk", "64m") as disk:
        spec = whole.spec
        run = PlannedRun(spec, run_paths(disk, spec.task, spec.method, spec.seed), "missing")
        prepare(run)
        trainer = Trainer(spec)
        for _ in range(3):
            trainer.advance()
        trainer.save(run.paths)
        write, filler = store.write_bytes, disk / "filler"

        def fill_first(path: Path, content: bytes, *arguments, **more) -> None:
            """The disk is full from the first write of the file in question on."""
            if path.name == file and not filler.exists():
                with filler.open("wb") as stream:
                    try:
                        while True:
                            stream.write(bytes(4096))
                            stream.flush()
                    except OSError:
                        pass
            write(path, content, *arguments, **more)

        checkpoint = run.paths.checkpoint.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_bytes", fill_first)
            if file == "status.json":  # even that is written then, into its own place
                assert execute(run.paths.root) in ("cancelled", "done")
            else:
                assert execute(run.paths.root) == "cancelled"
        status = read_json(run.paths.status)
        assert "No space left" in status["error"] and "\n" not in status["error"]
        assert run.paths.checkpoint.read_bytes() == checkpoint
        filler.unlink()
        assert execute(run.paths.root) == "done"
        assert results(run.paths) == results(whole.paths)


def crash(root: Path, *_: object) -> None:
    """Stands in the place of `execute`: a process that dies in compiled code."""
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


@contextmanager
def children_execute(function: Callable[..., object]) -> Iterator[None]:
    """Runs' processes are forked from here, and call `function`."""
    fork = multiprocessing.get_context("fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_forkserver_context", lambda: fork)
        patch.setattr("benchmark.launch.execute.execute", function)
        yield


def test_a_crash_is_a_failed_run_with_its_last_words_and_the_others_go_on(prepared) -> None:
    bad, good = prepared("dppo"), prepared("frozen")

    def sometimes(root: Path, *arguments) -> object:
        return crash(root) if root == bad.paths.root else execute(root, *arguments)

    with children_execute(sometimes):
        Pool(2, lambda: None).run([bad.paths.root, good.paths.root])
    status = read_json(bad.paths.status)
    assert status["state"] == "failed"
    assert status["error"] == "killed by SIGSEGV: Fatal Python error: Segmentation fault"
    assert read_json(good.paths.status)["state"] == "done"


def test_the_last_line_of_a_log_is_the_one_that_says_most(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert last_line(log) == ""
    log.write_bytes(b"x" * 100_000 + b"\none\n\xff two \n\n")
    assert last_line(log).endswith("two")


def test_asked_to_stop_it_saves_and_goes_on_to_the_same_end(prepared) -> None:
    run, whole = prepared("idql"), prepared("idql", "whole")
    execute(whole.paths.root)
    stop = Stop("queued")
    attempts = 0
    while execute(run.paths.root, stop=stop) != "done":  # an iteration at a time
        attempts += 1
        assert read_json(run.paths.status)["state"] == "queued"
        assert read_json(run.paths.status)["error"] is None
    assert attempts >= 6
    assert results(run.paths) == results(whole.paths)
    assert read_json(run.paths.status)["attempt"] == attempts + 1
    recorded = read_json(run.paths.provenance)["attempts"]
    assert [attempt["attempt"] for attempt in recorded] == list(range(1, attempts + 2))
    assert not any("packages" in attempt for attempt in recorded)


def test_an_attempt_names_the_versions_that_are_not_those_of_the_first(tmp_path, monkeypatch) -> None:
    path = tmp_path / "provenance.json"
    provenance.add_attempt(path, {"attempt": 1})
    monkeypatch.setattr(provenance, "version", lambda package: "0.1")
    provenance.add_attempt(path, {"attempt": 2})
    first, second = read_json(path)["attempts"]
    assert first.keys() == {"attempt", "git"} and second.keys() == {"attempt", "git", "packages"}
    assert set(second["packages"].values()) == {"0.1"}


def test_an_ended_run_is_left_alone(prepared) -> None:
    run = prepared("frozen")
    write_json(run.paths.status, {"state": "diverged", "error": "of old"})
    assert execute(run.paths.root) == "diverged"
    assert read_json(run.paths.status) == {"state": "diverged", "error": "of old"}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell script starts in the background ignores Ctrl-C, and these tests would with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_pool_and_the_next_call_goes_on(prepared, interruptible) -> None:
    run, whole = prepared("idql", loop={"iterations": 150}), prepared("idql", "whole", loop={"iterations": 150})
    execute(whole.paths.root)

    def press() -> None:
        wait_until(lambda: iteration(run.paths) > 5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        Pool(1, lambda: None).run([run.paths.root])
    assert read_json(run.paths.status)["state"] == "cancelled"
    Pool(1, lambda: None).run([run.paths.root])
    assert results(run.paths) == results(whole.paths)


def pool_of(root: Path) -> None:
    Pool(1, lambda: None).run([root])


def test_a_run_stops_when_its_launcher_is_killed_and_another_pool_waits_for_it(prepared) -> None:
    run = prepared("idql", loop=LONG)
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'tests']; from test_faults import *; "
         f"pool_of(Path({str(run.paths.root)!r}))"],
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    wait_until(lambda: iteration(run.paths) > 0)
    began = time.monotonic()
    Pool(1, lambda: None, patience=1.0).run([run.paths.root])  # in other hands: nothing is done, nothing is broken
    assert time.monotonic() - began < 30 and read_json(run.paths.status)["state"] == "running"
    launcher.kill()
    launcher.wait()
    wait_until(lambda: read_json(run.paths.status)["state"] == "cancelled")
    assert run.paths.checkpoint.exists()


def hang(root: Path, *_: object) -> None:
    """An attempt whose first iteration does not end, and that is alive all the while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
        patch.setattr(Trainer, "advance", lambda self: time.sleep(60))
        execute(root, time_limit=2.0)


def test_two_attempts_without_a_checkpoint_under_a_time_limit_are_the_end(prepared) -> None:
    run, context = prepared("idql"), multiprocessing.get_context("fork")
    for attempt in (1, 2):
        process = context.Process(target=hang, args=(run.paths.root,))
        process.start()
        wait_until(lambda expected=attempt: read_json(run.paths.status).get("attempt") == expected)
        time.sleep(2.0)
        process.kill()  # as SLURM does at the limit: nothing more is written
        process.join()
    assert execute(run.paths.root, time_limit=2.0) == "timed-out"
    error = read_json(run.paths.status)["error"]
    assert "an iteration takes more than 2 s" in error and "--time " in error
    assert execute(run.paths.root, time_limit=600.0) == "timed-out"
    (again,) = plan_runs([run.spec], run.paths.root.parents[2])
    prepare(again)  # as --retry-failed does
    assert execute(run.paths.root, time_limit=600.0) == "done"


def test_a_run_that_ended_after_it_was_planned_is_not_started_again(prepared) -> None:
    for state in ("done", "diverged"):
        run = prepared("frozen", state)
        (planned,) = plan_runs([run.spec], run.paths.root.parents[2])
        write_json(run.paths.status, {"state": state})  # by another call
        prepare(planned)
        assert read_json(run.paths.status)["state"] == state


def test_a_process_that_lost_its_run_does_not_write(prepared) -> None:
    run = prepared("idql")
    half_done(run)
    before = {path.name: path.read_bytes() for path in run.paths.root.iterdir()}

    def lost() -> None:
        raise LeaseLost("taken over")

    trainer = Trainer(run.spec)
    trainer.advance()
    for write in (lambda: trainer.save(run.paths, guard=lost), lambda: trainer.record(run.paths, lost)):
        with pytest.raises(LeaseLost):
            write()
    assert {path.name: path.read_bytes() for path in run.paths.root.iterdir()} == before


def test_what_killed_writers_left_is_removed(prepared) -> None:
    run = prepared("frozen")
    leftover = run.paths.root / ".checkpoint.pt.4711.tmp"
    leftover.write_bytes(b"half a checkpoint")
    assert execute(run.paths.root) == "done"
    assert not leftover.exists()


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_called_damaged(
    prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared("idql")
    half_done(run)

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(store.zipfile, "ZipFile", stale)
        assert execute(run.paths.root) == "cancelled"
    assert "Stale file handle" in read_json(run.paths.status)["error"]
    assert run.paths.checkpoint.exists() and execute(run.paths.root) == "done"


def test_a_damaged_status_stops_nobody_else(prepared) -> None:
    bad, good = prepared("dppo"), prepared("frozen")
    bad.paths.status.write_text("{half")
    assert [run.state for run in plan_runs([bad.spec, good.spec], bad.paths.root.parents[2])] == ["unknown", "queued"]

    def sometimes(root: Path, *arguments) -> object:
        return crash(root) if root == bad.paths.root else execute(root, *arguments)

    with children_execute(sometimes):
        Pool(1, lambda: None).run([bad.paths.root, good.paths.root])
    assert read_json(bad.paths.status)["state"] == "failed"
    assert read_json(good.paths.status)["state"] == "done"


def test_short_attempts_do_not_count_against_a_run(prepared) -> None:
    run = prepared("idql")
    for _ in range(5):
        died = {"state": "running", "checkpointed": False, "started": time.time() - 10, "heartbeat": time.time()}
        write_json(run.paths.status, read_json(run.paths.status) | died)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "advance", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            execute(run.paths.root, time_limit=60.0)
    assert execute(run.paths.root, time_limit=60.0) == "done"


def test_an_exploding_q_is_divergence(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared("idql")
    trainer = Trainer(toy_spec("idql"))
    update = type(trainer.method).update
    monkeypatch.setattr(
        type(trainer.method), "update", lambda self, rollout: update(self, rollout) | {"critic/q": -2 * EXPLODED_Q}
    )
    assert execute(run.paths.root) == "diverged"
    assert "Q exploded after iteration 1" in read_json(run.paths.status)["error"]
    assert [row["iteration"] for row in rows(run.paths.curve)] == ["0"]  # what was evaluated is known, however early
