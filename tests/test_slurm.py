"""Promises about a real SLURM: same bits as elsewhere, limits kept, and the same curves after every kind of fault.

The cluster is one node on this machine, brought up by tests/slurm/up.sh and taken down afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import toy_spec, wait_for_end
from test_faults import iteration, wait_until
from test_readme import SLURM
from test_runs import results

from benchmark.launch import cluster
from benchmark.launch.execute import execute
from benchmark.launch.slurm import FOLDER, SlurmOptions
from benchmark.launch.sweep import Sweep
from benchmark.plan import PlannedRun, plan_runs, prepare
from benchmark.run import Arguments, main
from benchmark.store import RunPaths, read_json, read_status, run_paths

pytestmark = pytest.mark.slurm
SCRIPTS = Path(__file__).parent / "slurm"
ROOT = Path(os.environ.get("SLURM_TEST_ROOT", "/var/tmp/slurm-test"))
LOOP = {"iterations": 1200, "eval_every": 300}  # seconds, not less: something has to happen meanwhile
FOLLOW_SECONDS = 600.0


def script(name: str) -> None:
    done = subprocess.run([SCRIPTS / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    """A running cluster."""
    if cluster.answers():
        yield
        return
    if os.getuid() or not shutil.which("apt-get"):
        pytest.skip("no SLURM answers here, and starting one takes root on Debian")
    started = subprocess.run([SCRIPTS / "up.sh"], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no SLURM could be started here: {started.stderr.strip()}")
    yield
    script("down.sh")


@pytest.fixture(autouse=True)
def in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is followed for ever: what has no end is shown, and its jobs make way for the next test."""
    follow_to_the_end = Sweep.follow

    def follow_for_a_while(sweep: Sweep, on_progress: Callable[[], None]) -> None:
        deadline = time.monotonic() + FOLLOW_SECONDS

        def look() -> None:
            on_progress()
            if time.monotonic() > deadline:
                seen = [read_status(run.paths) for run in sweep.runs]
                with contextlib.suppress(cluster.SlurmError):
                    seen += [cluster.job_states(), cluster.call("sinfo", "-hNl")]
                for plan in sweep.folder.glob("*/plan.json"):
                    subprocess.run(["scancel", f"--name={plan.parent.name}"])
                pytest.fail(f"no end after {FOLLOW_SECONDS} s: {seen}")

        follow_to_the_end(sweep, look)

    monkeypatch.setattr(Sweep, "follow", follow_for_a_while)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], object]:
    """What the run of a seed comes to when nothing happens to it."""
    held: dict[int, object] = {}

    def of(seed: int) -> object:
        if seed not in held:
            (run,) = planned(tmp_path_factory.mktemp("undisturbed"), [seed])
            prepare(run)
            execute(run.paths.root)
            held[seed] = results(run.paths)
        return held[seed]

    return of


def planned(out: Path, seeds: Sequence[int], **loop) -> list[PlannedRun]:
    return plan_runs([toy_spec("idql", seed, LOOP | loop) for seed in seeds], out)


def job_of(out: Path) -> str:
    """The id of the last submission."""
    plans = [read_json(path) for path in (out / FOLDER).glob("*/plan.json")]
    return max(plans, key=lambda plan: plan["created"])["job_id"]


def state(run: PlannedRun) -> str:
    return read_json(run.paths.status)["state"]


def begun(runs: Sequence[PlannedRun]) -> None:
    """Wait until all are on their way."""
    wait_until(lambda: all(iteration(run.paths) > 0 and state(run) == "running" for run in runs), 120)


def shell(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def kill(daemon: str) -> None:
    pid = int((ROOT / "run" / f"{daemon}.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_for_end([pid], 60)


def follow(sweep: Sweep) -> None:
    sweep.follow(lambda: None)


def meanwhile(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


@pytest.mark.parametrize("command", SLURM)
def test_the_readmes_commands(command: str, tmp_path: Path) -> None:
    arguments = [*shlex.split(command), "--dry-run", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *arguments], cwd=SCRIPTS.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=720" in done.stdout


def test_inline_local_and_slurm_give_the_same_bits(tmp_path: Path) -> None:
    found = {}
    for launcher in ("inline", "local", "slurm"):
        out = tmp_path / launcher
        assert main(Arguments(suite="smoke", out=out, launcher=launcher)) == 0
        roots = sorted(path.parent for path in out.glob("*/*/seed-*/spec.json"))
        found[launcher] = [results(RunPaths(root)) for root in roots]
    assert len(found["inline"]) == 6
    assert found["inline"] == found["local"] == found["slurm"]


def test_sixty_runs_never_more_than_three_at_once(tmp_path: Path) -> None:
    runs = plan_runs([toy_spec("frozen", seed) for seed in range(60)], tmp_path)
    sweep = Sweep(tmp_path, runs, SlurmOptions(mem="1G"), max_parallel=3)
    assert len(sweep.submit(runs)) == 2  # the site's arrays hold 40 at most
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.5):
            most = max(most, sum(state == "RUNNING" for state, _ in cluster.job_states().values()))

    watcher = meanwhile(watch)
    try:
        follow(sweep)
    finally:
        done.set()
        watcher.join()
    assert {state(run) for run in runs} == {"done"}
    assert 1 < most <= 3
    statuses = [read_json(run.paths.status) for run in runs]
    for status in statuses:  # by the runs' own record, too
        during = [other for other in statuses if other["started"] <= status["started"] < other["heartbeat"]]
        assert len(during) <= 3


def test_cancelled_then_run_again(tmp_path: Path, undisturbed) -> None:
    runs = planned(tmp_path, [0])
    sweep = Sweep(tmp_path, runs, SlurmOptions())
    sweep.submit(runs)
    begun(runs)
    shell("scancel", job_of(tmp_path))
    follow(sweep)
    assert state(runs[0]) == "cancelled"
    sweep = Sweep(tmp_path, runs, SlurmOptions())
    assert sweep.submit(runs)
    follow(sweep)
    assert state(runs[0]) == "done"
    assert results(runs[0].paths) == undisturbed(0)


def test_requeued_from_outside_and_warned_before_the_end(tmp_path: Path, undisturbed) -> None:
    runs = planned(tmp_path, [0, 1])
    sweep = Sweep(tmp_path, runs, SlurmOptions(runs_per_job=2))
    sweep.submit(runs)
    begun(runs)
    shell("scontrol", "requeue", job_of(tmp_path))
    wait_until(lambda: all(read_json(run.paths.status)["attempt"] >= 2 for run in runs), 120)
    begun(runs)
    reached = min(iteration(run.paths) for run in runs)
    shell("scancel", "--signal=USR2", job_of(tmp_path))  # what SLURM sends before the time limit and a preemption
    wait_until(lambda: all(state(run) in ("queued", "done") for run in runs), 60)
    assert all(run.paths.checkpoint.exists() and iteration(run.paths) >= reached for run in runs)
    follow(sweep)
    for seed, run in enumerate(runs):
        assert state(run) == "done"
        assert results(run.paths) == undisturbed(seed)
    assert len(list((tmp_path / FOLDER).glob("*/plan.json"))) == 1  # SLURM itself put the job back


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_run(tmp_path: Path) -> None:
    (trial,) = planned(tmp_path / "trial", [0], iterations=300)
    prepare(trial)
    execute(trial.paths.root)
    pace = 300 / read_json(trial.paths.status)["wall_seconds"]
    (run,) = planned(tmp_path, [0], iterations=int(90 * pace))  # SLURM warns 15 to 40 seconds after the start
    sweep = Sweep(tmp_path, [run], SlurmOptions(time="1"))
    sweep.submit([run])
    (other,) = planned(tmp_path / "whole", [0], iterations=int(90 * pace))
    prepare(other)
    execute(other.paths.root)
    follow(sweep)
    assert state(run) == "done", read_json(run.paths.status)
    assert read_json(run.paths.status)["attempt"] >= 2
    assert results(run.paths) == results(other.paths)


def test_a_node_that_goes_down(tmp_path: Path, undisturbed) -> None:
    runs = planned(tmp_path, [0])
    sweep = Sweep(tmp_path, runs, SlurmOptions())
    sweep.submit(runs)
    begun(runs)
    node = os.uname().nodename.split(".")[0]
    shell("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def repair() -> None:
        time.sleep(15)
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"])  # refused where it is back already

    repairing = meanwhile(repair)
    follow(sweep)
    repairing.join()
    assert state(runs[0]) == "done"
    assert read_json(runs[0].paths.status)["attempt"] >= 2
    assert results(runs[0].paths) == undisturbed(0)


def test_a_controller_that_dies_and_comes_back(tmp_path: Path, undisturbed, capsys) -> None:
    runs = planned(tmp_path, [0])
    sweep = Sweep(tmp_path, runs, SlurmOptions())
    sweep.submit(runs)
    begun(runs)
    time.sleep(6)  # the controller writes what it knows up to 5 seconds later: a job that it forgot is submitted again
    kill("slurmctld")
    try:
        assert sweep.check() or state(runs[0]) == "done"
        assert "; trying again" in capsys.readouterr().out
        assert state(runs[0]) in ("running", "done")  # nothing is decided meanwhile
    finally:
        script("up.sh")
    follow(sweep)
    assert state(runs[0]) == "done"
    assert len(list((tmp_path / FOLDER).glob("*/plan.json"))) == 1
    assert results(runs[0].paths) == undisturbed(0)


def test_without_accounting(tmp_path: Path, undisturbed) -> None:
    kill("slurmdbd")
    try:
        assert cluster.ended_state("otpr-bench-none", 0) is None
        runs = planned(tmp_path, [0])
        sweep = Sweep(tmp_path, runs, SlurmOptions())
        sweep.submit(runs)
        begun(runs)
        pid = read_json(runs[0].paths.status)["pid"]
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        for victim in (pid, parent):  # dies without a word, like a job out of memory
            os.kill(victim, signal.SIGKILL)
        subprocess.run(["scancel", "--signal=KILL", job_of(tmp_path)])  # refused where the job has ended of that
        follow(sweep)
        assert state(runs[0]) in ("failed", "cancelled")
        assert main_again(tmp_path) == "done"
        assert results(runs[0].paths) == undisturbed(0)
    finally:
        script("up.sh")


def main_again(out: Path) -> str:
    """What `--retry-failed` does: a new plan, which knows that the run has failed, is submitted."""
    runs = planned(out, [0])
    sweep = Sweep(out, runs, SlurmOptions())
    sweep.submit(runs)
    follow(sweep)
    return state(runs[0])


SUBMITTER = """
import os, signal, sys
sys.path[:0] = [".", "tests"]
from pathlib import Path
from benchmark.launch import sweep
from benchmark.launch.slurm import SlurmOptions
from test_slurm import planned
out, moment, count = Path(sys.argv[1]), sys.argv[2], 0
if moment == "after sbatch":  # the second writing of plan.json tells the id
    write = sweep.write_json
    def write_json(path, value):
        if "job_id" in value:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)
    sweep.write_json = write_json
elif moment == "between two":
    submit = sweep.Sweep._submit_array
    def submit_array(self, *arguments):
        if list(self.folder.glob("*/plan.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        return submit(self, *arguments)
    sweep.Sweep._submit_array = submit_array
    sweep.cluster.array_cap = lambda: 1
runs = planned(out, [0, 1])
made = sweep.Sweep(out, runs, SlurmOptions())
print(made.submit(runs), flush=True)
made.follow(lambda: None)
"""


def submitter(out: Path, moment: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUBMITTER, out, moment], cwd=SCRIPTS.parents[1], text=True, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("moment", ["following", "after sbatch", "between two"])
def test_a_submitter_that_is_killed(moment: str, tmp_path: Path, undisturbed) -> None:
    process, runs = submitter(tmp_path, moment), planned(tmp_path, [0, 1])
    if moment == "following":
        begun(runs)
        process.kill()
    assert process.wait(timeout=120) == -signal.SIGKILL
    sweep = Sweep(tmp_path, planned(tmp_path, [0, 1]), SlurmOptions())
    assert len(sweep.submit(runs)) == (1 if moment == "between two" else 0)  # what is there is not submitted twice
    follow(sweep)
    for seed, run in enumerate(runs):
        assert state(run) == "done"
        assert results(run.paths) == undisturbed(seed)


def test_two_submitters_at_once(tmp_path: Path, undisturbed) -> None:
    both = [submitter(tmp_path), submitter(tmp_path)]
    outputs = sorted(process.communicate(timeout=300)[0].splitlines()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] != outputs[1] == "[]"  # one submits, the other attaches
    for seed in (0, 1):
        paths = run_paths(tmp_path, "toy", "idql", seed)
        assert read_json(paths.status)["attempt"] == 1
        assert results(paths) == undisturbed(seed)


@pytest.mark.parametrize(
    "options, words",
    [
        (SlurmOptions(partition="nowhere"), ["partition"]),
        (SlurmOptions(cpus=999), ["SLURM refuses a job of 999 cores", "rocessors"]),
        (SlurmOptions(mem="900T"), ["943718400 MiB", "node configuration is not available"]),
        (SlurmOptions(time="-5"), ["--time", "'-5'"]),
        (SlurmOptions(sbatch=("no-such-option=1",)), ["no-such-option"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_what_slurm_refuses_is_one_line_and_nothing_is_submitted(
    options: SlurmOptions, words: list[str], tmp_path: Path, capsys
) -> None:
    before = cluster.job_states().keys()
    assert main(Arguments(suite="smoke", out=tmp_path / "out", launcher="slurm", slurm=options)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert cluster.job_states().keys() == before
    assert not (tmp_path / "out").exists()
