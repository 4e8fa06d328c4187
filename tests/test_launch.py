"""Promises about launchers that need no SLURM: what is asked of it, what its answers mean, what a machine can hold."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import toy_spec

from benchmark.launch import cluster, launcher, resources, slurm
from benchmark.launch.resources import GpuSlots, available_cores, available_memory, visible_gpus
from benchmark.launch.slurm import Array, SlurmOptions, arrays, too_short
from benchmark.launch.sweep import FRUITLESS_JOBS, Sweep
from benchmark.plan import PlannedRun, plan_runs, prepare
from benchmark.run import Arguments, main
from benchmark.store import read_json, write_json

submitit = pytest.importorskip("submitit")


PAGES_TAKEN = """
import resource, sys, torch
from benchmark.launch.resources import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(1 << 20) for _ in range(8)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_a_job_runs_itself_needs_no_pytorch() -> None:
    code = "import sys; import benchmark.launch.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other allocator is told anything")
def test_freed_memory_is_kept() -> None:
    # glibc's own threshold moves, so that whether it gives this memory back is chance; told where to start, it stays
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    options = {"capture_output": True, "text": True, "check": True, "env": environment}
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", PAGES_TAKEN, how], **options).stdout)
        for how in ("as it comes", "keep")
    )
    assert given_back > 1000  # pages of 4 KiB, or the test shows nothing
    assert kept < given_back / 20


@pytest.mark.parametrize(
    "text, minutes",
    [("30", 30), ("0:30", 1), ("1:30", 2), ("2:00:00", 120), ("1-0", 1440), ("1-2:30", 1590), ("1-2:30:01", 1591)],
)
def test_times_are_slurms(text: str, minutes: int) -> None:
    assert cluster.parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "an hour", "1-", "1:2:3:4"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time takes minutes"):
        cluster.parse_minutes(text)


def test_memory_is_read_in_its_units() -> None:
    assert [cluster.parse_memory(text) for text in ("6", "6G", "6GB", "500M", "1.5g", "1T")] == [
        6144, 6144, 6144, 500, 1536, 1024**2,
    ]  # fmt: skip
    for text in ("", "G", "-1G", "0", "4K", "4 apples"):
        with pytest.raises(ValueError, match="--mem takes a size"):
            cluster.parse_memory(text)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"launcher": "slurm"}, ["SLURM does not answer", "--launcher local"]),
        ({"slurm": SlurmOptions(partition="gpu")}, ["--partition", "there is no SLURM here"]),
        ({"launcher": "local", "slurm": SlurmOptions(detach=True)}, ["--detach", "the launcher is local"]),
        ({"slurm": SlurmOptions(time="-1")}, ["--time", "'-1'"]),
        ({"slurm": SlurmOptions(mem="lots")}, ["--mem", "'lots'"]),
        ({"slurm": SlurmOptions(cpus=0)}, ["--cpus", "0"]),
        ({"slurm": SlurmOptions(gpus=-1)}, ["--gpus", "-1"]),
        ({"slurm": SlurmOptions(runs_per_job=0)}, ["--runs-per-job", "0"]),
        ({"slurm": SlurmOptions(sbatch=("--exclusive",))}, ["--sbatch", "KEY=VALUE"]),
        ({"slurm": SlurmOptions(sbatch=("time=5",))}, ["--sbatch time", "use --time"]),
        ({"max_parallel": 0}, ["--max-parallel", "0"]),
        ({"from_spec": Path("spec.json"), "suite": None, "seeds": "3"}, ["--from-spec", "--seeds"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_bad_options_are_one_line_and_exit_2(
    fields: dict, words: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    assert main(Arguments(**{"suite": "smoke", "out": tmp_path / "out", **fields})) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "out").exists()


def test_auto_takes_slurm_where_it_answers_and_not_inside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "answers", lambda: True)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launcher.choose_launcher("auto", SlurmOptions()) == "slurm"
    assert launcher.choose_launcher("local", SlurmOptions()) == "local"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert launcher.choose_launcher("auto", SlurmOptions()) == "local"


@pytest.fixture
def runs(tmp_path: Path) -> list[PlannedRun]:
    return plan_runs([toy_spec(method, seed) for method in ("frozen", "idql") for seed in range(5)], tmp_path)


def test_runs_of_a_method_share_jobs_and_arrays_keep_to_the_cap(runs: list[PlannedRun]) -> None:
    (array,) = arrays(runs, SlurmOptions(runs_per_job=2, time="60", mem="2G"), cap=100)
    assert [[run.spec.method for run in pack] for pack in array.packs] == [
        ["frozen", "frozen"], ["frozen", "frozen"], ["frozen"], ["idql", "idql"], ["idql", "idql"], ["idql"],
    ]  # fmt: skip
    split = arrays(runs, SlurmOptions(time="60", mem="2G"), cap=4)
    assert [len(part.packs) for part in split] == [4, 4, 2]
    assert [run for part in split for pack in part.packs for run in pack] == runs


def test_a_job_has_the_cores_and_the_memory_of_all_its_runs(runs: list[PlannedRun]) -> None:
    one, four = (slurm.job_resources(runs[:count], SlurmOptions()) for count in (1, 4))
    assert (one.cpus, four.cpus) == (1, 4)
    assert four.memory > 2 * one.memory
    with pytest.raises(ValueError, match="--cpus 3 is less than the 4 threads"):
        slurm.job_resources(runs[:4], SlurmOptions(cpus=3))


def test_a_limit_below_two_iterations_is_said_before_submission(tmp_path: Path) -> None:
    long = plan_runs([toy_spec("dppo", loop={"n_envs": 1000, "n_steps": 20_000, "iterations": 10})], tmp_path)
    (array,) = arrays(long, SlurmOptions(time="1"), cap=10)
    (line,) = too_short(array)
    assert line.startswith("warning: an iteration of toy/dppo takes about") and "--time" in line
    (array,) = arrays(long, SlurmOptions(time="3-0"), cap=10)
    assert too_short(array) == []


def test_the_batch_script_says_what_was_asked(runs: list[PlannedRun], tmp_path: Path, monkeypatch) -> None:
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    options = SlurmOptions("gpu", "lab", "2:00:00", "3G", 2, 1, 2, ("qos=low", "exclusive"))
    text = slurm.batch_text(arrays(runs, options, 100)[0], options, tmp_path / "out", max_parallel=4)
    for line in (
        "partition=gpu", "account=lab", "time=120", "mem=3072MB", "cpus-per-task=2", "gpus-per-node=1", "array=0-5%2",
        "qos=low", "exclusive", "requeue", "signal=USR2@300",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text, line
    assert "--cpus-per-task 2" in text  # of srun
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sweep(runs: list[PlannedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """One run whose job ended as told, followed by a launcher that only notes what it would submit again."""

    def make(job: str, **status: object) -> Sweep:
        monkeypatch.setattr(cluster, "job_states", lambda: {("otpr-bench-a", 0): (job, "7")} if job else {})
        monkeypatch.setattr(cluster, "ended_state", lambda name, index: None)
        run = runs[0]
        prepare(run)
        write_json(run.paths.status, read_json(run.paths.status) | status)
        plan = {"name": "otpr-bench-a", "created": 1.0, "job_id": "7", "packs": [[str(run.paths.root.absolute())]],
                "iterations": {str(run.paths.root.absolute()): 2}}  # fmt: skip
        write_json(tmp_path / slurm.FOLDER / "otpr-bench-a" / "plan.json", plan)
        made = Sweep(tmp_path, [run], SlurmOptions())
        made.again = 0  # type: ignore[attr-defined]

        def submit(runs: list[PlannedRun]) -> list[str]:
            made.again += len(runs)  # type: ignore[attr-defined]
            name = f"otpr-bench-{made.again}"  # type: ignore[attr-defined]
            write_json(made.folder / name / "plan.json", plan | {"name": name, "created": 1.0 + made.again})  # type: ignore[attr-defined]
            return ["7"]

        monkeypatch.setattr(made, "submit", submit)
        return made

    return make


@pytest.mark.parametrize("job", sorted(cluster.LIVE))
def test_a_living_job_is_waited_for(job: str, sweep) -> None:
    made = sweep(job, state="running", iteration=3)
    assert made.check() and made.again == 0


@pytest.mark.parametrize("job", ["TIMEOUT", "PREEMPTED", "NODE_FAIL", "COMPLETED", ""])
def test_what_was_lost_is_submitted_again(job: str, sweep) -> None:
    made = sweep(job, state="running", iteration=3)
    assert made.check() and made.again == 1


@pytest.mark.parametrize("job", ["FAILED", "OUT_OF_MEMORY"])
def test_a_job_that_broke_is_a_failed_run_with_the_jobs_last_words(job: str, sweep, runs, tmp_path: Path) -> None:
    made = sweep(job, state="running", iteration=3)
    (tmp_path / slurm.FOLDER / "otpr-bench-a" / "7_0_log.err").write_text("slurmstepd: Exceeded job memory limit\n")
    assert not made.check() and made.again == 0
    status = read_json(runs[0].paths.status)
    assert status["state"] == "failed" and f"ended as {job} (slurmstepd: Exceeded" in status["error"]


def test_a_job_stopped_with_a_checkpoint_that_could_not_requeue_is_submitted_again(sweep) -> None:
    made = sweep("FAILED", state="queued", iteration=3)
    assert made.check() and made.again == 1


def test_a_cancelled_job_is_not_started_again_by_the_same_call(sweep, runs) -> None:
    made = sweep("CANCELLED", state="running", iteration=3)
    assert not made.check() and made.again == 0
    assert read_json(runs[0].paths.status)["state"] == "cancelled"


def test_jobs_that_get_nowhere_end_as_failed(sweep, runs) -> None:
    made = sweep("", state="running", iteration=2)
    for _ in range(FRUITLESS_JOBS - 1):
        assert made.check()
    assert not made.check() and made.again == FRUITLESS_JOBS - 1
    assert read_json(runs[0].paths.status)["state"] == "failed"


def test_a_run_stopped_by_a_preemption_goes_on_and_one_that_met_a_full_disk_does_not(sweep) -> None:
    made = sweep("PREEMPTED", state="queued", iteration=3)
    assert made.check() and made.again == 1
    made = sweep("COMPLETED", state="cancelled", iteration=3)
    assert not made.check() and made.again == 0


@pytest.mark.parametrize("job", [True, False], ids=["a job that ended", "no job yet"])
def test_submissions_that_slurm_refuses_are_not_held_against_the_run(
    job: bool, sweep, runs, monkeypatch, capsys
) -> None:
    made = sweep("NODE_FAIL" if job else "", state="queued", iteration=2)

    def refuse(runs: list[PlannedRun]) -> list[str]:
        raise cluster.SlurmError("refused the jobs: Socket timed out")

    monkeypatch.setattr(made, "submit", refuse)
    (plan,) = made.folder.glob("*/plan.json")
    content = read_json(plan)
    if not job:
        del content["job_id"]
    write_json(plan, content)
    for _ in range(2 * FRUITLESS_JOBS):
        assert made.check()
    assert "refused the jobs: Socket timed out; trying again" in capsys.readouterr().out
    assert read_json(runs[0].paths.status)["state"] == "queued"


def test_what_slurm_refuses_after_it_took_some_is_left_for_later(runs, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cluster, "job_states", dict)
    monkeypatch.setattr(cluster, "array_cap", lambda: 1)
    made, sent = Sweep(tmp_path, runs, SlurmOptions(mem="2G")), []

    def submit(array: Array, after: list[str]) -> str:
        if sent:
            raise cluster.SlurmError("refused the jobs: MaxSubmitJobs")
        sent.extend(array.packs)
        return "7"

    monkeypatch.setattr(made, "_submit_array", submit)
    assert made.submit(runs) == ["7"]
    assert "refused the jobs: MaxSubmitJobs; the jobs 7 go on, other runs have none" in capsys.readouterr().out
    assert all(read_json(run.paths.status)["state"] == "queued" for run in runs)  # they are open, for `status` too
    with pytest.raises(cluster.SlurmError, match="MaxSubmitJobs"):
        made.submit(runs)


def test_a_plan_that_cannot_be_read_is_left_out(sweep) -> None:
    made = sweep("RUNNING", state="running", iteration=2)
    (made.folder / "other").mkdir()
    (made.folder / "other" / "plan.json").write_text("{half")
    assert made.check() and made.again == 0


def test_no_answer_decides_nothing(sweep, runs, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    made = sweep("TIMEOUT", state="running", iteration=2)

    def silent() -> None:
        raise cluster.SlurmError("Unable to contact slurm controller")

    monkeypatch.setattr(cluster, "job_states", silent)
    assert made.check() and made.again == 0
    assert "SLURM: Unable to contact slurm controller; trying again" in capsys.readouterr().out
    assert read_json(runs[0].paths.status)["state"] == "running"


def test_a_following_launcher_does_not_grow(sweep) -> None:
    made = sweep("RUNNING", state="running", iteration=3)
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(3):
            for _ in range(300):
                made.check()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[2] - sizes[1] < 20_000, sizes


def test_gpu_slots_are_shared_by_all_and_spread_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.tempfile, "gettempdir", lambda: str(tmp_path))
    one, other = GpuSlots(["0", "1"], 2), GpuSlots(["0", "1"], 2)
    first, second, third = one.take(), other.take(), one.take()
    assert first and second and third
    assert {first[0], second[0]} == {"0", "1"} and len({first, second, third}) == 3
    fourth = other.take()
    assert one.take() is None and fourth is not None
    one.give_back(first)
    assert other.take() == first
    assert fourth != third


def test_the_machine_is_what_the_job_leaves_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() >= 1 and available_memory() > 0
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert available_cores() == 1 and available_memory() <= 0.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
