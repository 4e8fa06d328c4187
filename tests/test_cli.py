"""The commands as a user meets them: exit status, one clear line, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_spec

from benchmark import run, status
from benchmark.launch.slurm import SlurmOptions
from benchmark.methods import ARMS, resolve_settings
from benchmark.plan import choose, make_specs, resolve_device
from benchmark.policies import policy_path
from benchmark.store import write_json
from benchmark.suites import load_suite, parse_seeds, suite_names
from benchmark.tasks import TASKS, get_task


def call(out: Path, *extra: str, suite: str = "smoke", launcher: Any = "inline", **fields) -> int:
    """`benchmark.run` on a suite with `--set` values in `extra`."""
    return run.main(run.Arguments(suite=suite, out=out, set=extra, launcher=launcher, **fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suite": "fast"}, ["fast", "smoke", "quick"]),
        ({"tasks": ("ant",)}, ["ant", "hopper-local", "toy"]),
        ({"methods": ("ppo",)}, ["ppo", "dppo", "otpr"]),
        ({"seeds": "3-1"}, ["3-1"]),
        ({"seeds": "zero"}, ["zero"]),
        ({"seeds": "999-1000"}, ["1000", "tuning"]),
        ({"max_parallel": 0}, ["--max-parallel", "0"]),
        ({"launcher": "inline", "max_parallel": 2}, ["--max-parallel 2", "inline"]),
        ({"suite": "toy-transport", "launcher": "slurm"}, ["toy-transport", "SLURM"]),
        ({"suite": "toy-transport", "slurm": SlurmOptions(detach=True)}, ["toy-transport", "SLURM"]),
        ({"device": "tpu"}, ["tpu", "cpu", "cuda"]),
        ({"precision": "float16"}, ["float16", "float32", "bfloat16"]),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(fields: dict, words: list[str], tmp_path: Path, capsys) -> None:
    arguments = {"suite": "smoke", **fields}
    assert call(tmp_path / "out", **arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("dppo.clip=1", ["clip", "clip_coef"]),
        ("dppo.discount=2", ["discount", "[0, 1]", "2"]),
        ("dppo.discount=fast", ["discount", "fast"]),
        ("dppo.clip_rate=Infinity", ["clip_rate", "finite", "inf"]),
        ("dppo.ft_denoising_steps=30", ["toy, dppo", "ft_denoising_steps", "30", "--set dppo.FIELD=VALUE"]),
        ("dppo.critic_hidden_dims=[0]", ["critic_hidden_dims", "0"]),
        ('idql.critic_hidden_dims=["a"]', ["critic_hidden_dims", "int", "'a'"]),
        ("otpr.epsilon=0", ["epsilon", "0"]),
        ("otpr.keypoints=0", ["guide_weight", "needs keypoints"]),
        ("otpr.keypoints=100000", ["keypoints", "100000"]),
        ("otpr.guidance=value", ["guidance", "value", "advantage"]),
        ("otpr.expert_share=0.9", ["expert_share", "0.9"]),
        ("otpr.action_bound=0.5", ["action_bound", "0.5"]),
        ("ppo.discount=1", ["ppo", "dppo"]),
        ("discount=1", ["METHOD.FIELD=VALUE"]),
        ("idql.time_limit=never", ["never", "bootstrap"]),
        ("idql.replay_capacity=1000000000000000", ["toy, idql", "memory", "--set idql.FIELD=VALUE"]),
        (f"dppo.clip_rate=1{'0' * 400}", ["clip_rate", "finite", "401 digits"]),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(assignment: str, words: list[str], tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "out", assignment) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_exit_2(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert call(tmp_path / "file" / "out") == 2
    assert "not a directory" in capsys.readouterr().err
    if Path("/proc").is_dir():  # refuses writes even to the superuser
        assert call(Path("/proc/otpr-bench")) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_damaged_policy_is_exit_2(tmp_path: Path, capsys, monkeypatch) -> None:
    path = policy_path(get_task("toy"))
    shutil.copy(path.with_suffix(".json"), tmp_path)
    (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    monkeypatch.setattr("benchmark.policies.FOLDER", tmp_path)
    assert call(tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "toy.pt" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_that_differ_from_the_directory_are_refused(prepared, tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "out", methods=("frozen",)) == 0
    assert call(tmp_path / "out", methods=("frozen",), seeds="0-1", dry_run=True) == 0
    spec = tmp_path / "out" / "toy" / "frozen" / "seed-0" / "spec.json"
    changed = json.loads(spec.read_text()) | {"threads": 7}
    spec.write_text(json.dumps(changed))
    assert call(tmp_path / "out", methods=("frozen",)) == 2
    assert "digest" in capsys.readouterr().err


def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark.run", "--suite", "all", "--dry-run", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_done_suite_is_not_run_again_and_status_says_so(tmp_path: Path, capsys) -> None:
    assert call(tmp_path, methods=("frozen",)) == 0
    first = (tmp_path / "toy" / "frozen" / "seed-0" / "status.json").read_text()
    capsys.readouterr()
    assert call(tmp_path, methods=("frozen",)) == 0
    assert "0 to do" in capsys.readouterr().out
    assert (tmp_path / "toy" / "frozen" / "seed-0" / "status.json").read_text() == first
    assert status.main(status.Arguments(out=tmp_path, json=True)) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "done"
    assert status.main(status.Arguments(out=tmp_path / "nothing")) == 2


def test_a_failing_run_gives_exit_1_and_is_retried_only_when_asked(tmp_path: Path, capsys) -> None:
    bad = "dppo.actor_learning_rate=1e30"
    assert call(tmp_path, bad, methods=("dppo", "frozen")) == 1
    assert "diverged" in capsys.readouterr().err
    assert call(tmp_path, bad, methods=("dppo", "frozen")) == 1
    assert "0 to do" in capsys.readouterr().out
    assert call(tmp_path, bad, methods=("dppo", "frozen"), retry_failed=True) == 1
    assert "1 to do" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_gives_exit_1(tmp_path: Path, capsys) -> None:
    (tmp_path / "report").write_text("in the way")
    assert call(tmp_path, methods=("frozen",)) == 1
    assert "no report" in capsys.readouterr().err


def test_auto_is_the_same_device_on_every_machine_but_in_jobs_with_gpus(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [resolve_device("auto"), resolve_device("auto", 0), resolve_device("auto", 1)] == ["cpu", "cpu", "cuda"]
    assert [resolve_device("cuda"), resolve_device("cpu", 1)] == ["cuda", "cpu"]


def test_from_spec_repeats_a_run(tmp_path: Path) -> None:
    assert call(tmp_path / "first", methods=("frozen",)) == 0
    place = Path("toy") / "frozen" / "seed-0"
    again = run.Arguments(from_spec=tmp_path / "first" / place / "spec.json", out=tmp_path / "again", launcher="inline")
    assert run.main(again) == 0
    first, second = ((tmp_path / name / place / "curve.csv").read_text().splitlines() for name in ("first", "again"))
    drop = first[0].split(",").index("wall_seconds")
    strip = [[[v for i, v in enumerate(row.split(",")) if i != drop] for row in rows] for rows in (first, second)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "ant"}, ["'ant'", "toy"]),
        ({"policy_digest": "0" * 64}, ["pre-trained policy of toy", "000000000000"]),
        ({"device": "cuda"}, ["cuda", "cpu"]),
        ({"method": "ppo"}, ["'ppo'", "dppo"]),
    ],
)
def test_a_spec_that_cannot_run_here_is_one_line_and_exit_2(
    changes: dict, words: list[str], tmp_path: Path, capsys
) -> None:
    write_json(tmp_path / "spec.json", replace(toy_spec("frozen"), **changes).as_dict())
    for dry_run in (True, False):
        again = {"from_spec": tmp_path / "spec.json", "out": tmp_path / "out", "launcher": "local"}
        assert run.main(run.Arguments(**again, dry_run=dry_run)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_plans(name: str, tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "out", suite=name, dry_run=True) == 0
    assert not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    for part in [load_suite(part) for part in load_suite(name).parts] or [load_suite(name)]:
        for task in part.tasks:
            for method in part.methods:
                assert any(line.split()[:2] == [task, method] for line in lines), (task, method)


def test_published_settings_are_the_published_ones() -> None:
    dppo = resolve_settings("dppo", TASKS["hopper-medium-v2"], "published", {})
    values = (dppo.batch_size, dppo.update_epochs, dppo.ft_denoising_steps, dppo.discount, dppo.gae_lambda)
    assert values == (50_000, 5, 10, 0.99, 0.95)
    assert (dppo.actor_learning_rate, dppo.critic_learning_rate, dppo.clip_coef) == (1e-4, 1e-3, 0.01)
    idql = resolve_settings("idql", TASKS["hopper-medium-v2"], "published", {})
    assert (idql.candidates, idql.replay_ratio, idql.batch_size, idql.critic_tau) == (20, 128, 1000, 0.001)
    assert (idql.reward_scale, idql.replay_capacity, idql.expectile) == (0.01, 1_000_000, 0.8)
    dql = resolve_settings("dql", TASKS["hopper-medium-v2"], "published", {})
    assert (dql.eta, dql.replay_ratio, dql.batch_size, dql.target_ema) == (1.0, 16, 1000, 0.005)
    loop = TASKS["hopper-local"].loop("published")
    assert (loop.n_envs, loop.n_steps, loop.n_envs * loop.n_steps * 4 * loop.iterations) == (40, 500, 72_000_000)


def test_off_policy_methods_take_equal_gradient_steps_in_short_budgets() -> None:
    for task in (task for task in TASKS.values() if "embedded" in task.loops):
        arms = [resolve_settings(name, task, "embedded", {}) for name in ("otpr", "idql", "dql", "dql-dppo")]
        assert len({(arm.replay_ratio, arm.batch_size, arm.critic_warmup_iterations) for arm in arms}) == 1


def test_seed_ranges() -> None:
    assert parse_seeds("3") == [0, 1, 2] and parse_seeds("2-4") == [2, 3, 4]


def test_a_suite_may_have_more_seeds_on_some_tasks_until_the_user_says_otherwise() -> None:
    local = replace(load_suite("local"), tasks=("hopper-local", "walker2d-local"), methods=("frozen",))
    planned = [(spec.task, spec.seed) for spec in make_specs([local], {}, "cpu")]
    assert planned == [("hopper-local", seed) for seed in range(5)] + [("walker2d-local", seed) for seed in range(3)]
    asked = make_specs(choose(local, [], [], "2"), {}, "cpu")
    assert [(spec.task, spec.seed) for spec in asked] == [
        (task, seed) for task in ("hopper-local", "walker2d-local") for seed in (0, 1)
    ]


MINE = 'protocol = "embedded"\ntasks = ["toy"]\nmethods = ["frozen", "idql"]\n'


def test_a_suite_of_ones_own(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE + 'seeds = "2"\n[loop]\niterations = 2\n[settings.idql]\ncandidates = 3\n')
    assert call(tmp_path / "out", suite=str(file), dry_run=True) == 0
    assert "seeds 0, 1; 2 iterations" in capsys.readouterr().out
    specs = make_specs([load_suite(str(file))], {}, "cpu")
    assert {(spec.method, spec.settings.get("candidates")) for spec in specs} == {("frozen", None), ("idql", 3)}


def test_common_settings_reach_every_method_that_has_them_and_its_own_come_after(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    common = "[common_settings]\nreplay_ratio = 8\nweight_clip = 5.0\n[settings.dql]\nreplay_ratio = 2.0\n"
    file.write_text(MINE.replace('"idql"', '"idql", "dql", "dppo", "otpr-selection"') + common)
    suite = choose(load_suite(str(file)), ["frozen", "idql", "dql", "dppo", "otpr-selection"], [], None)
    specs = make_specs(suite, {"otpr-selection": {"candidates": 3}}, "cpu", plan_only=True)
    ratios = {"frozen": None, "dppo": None, "idql": 8.0, "dql": 2.0, "otpr-selection": 8.0}
    assert {spec.method: spec.settings.get("replay_ratio") for spec in specs} == ratios
    with pytest.raises(ValueError, match="'otpr-selection': weight_clip changes nothing with weighting off"):
        make_specs(suite, {"otpr-selection": {"weight_clip": 3.0}}, "cpu", plan_only=True)  # asked of it alone


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks = [", ["mine.toml", "Invalid"]),
        ('tasks = ["toy"]', ["nothing to run"]),
        (MINE + "seed = 3", ["'seed'", "valid", "seeds"]),
        (MINE + "seeds = 3", ["seeds", "str", "3"]),
        (MINE + "threads = 0", ["threads", "0"]),
        (MINE + 'precision = "half"', ["'half'", "bfloat16"]),
        (MINE.replace('"toy"', "3"), ["name", "str", "3"]),
        (MINE.replace("embedded", "short"), ["'short'", "embedded"]),
        (MINE + "[loop]\nlength = 3", ["loop", "'length'", "iterations"]),
        (MINE + "[loop]\niterations = 2.5", ["iterations", "int", "2.5"]),
        (MINE + "[loop]\neval_episodes = 0", ["eval_episodes", "0"]),
        (MINE + '[sampler]\nkind = "heun"', ["sampler", "heun", "ddim"]),
        (MINE + "[settings]\nidql = 3", ["settings.idql", "dict", "3"]),
        (MINE + "[settings.iddql]", ["iddql", "idql"]),
        ('parts = ["smoke"]\nseeds = "0-4"', ["has parts", "takes no seeds"]),
        ('parts = ["all"]', ["its part 'all'", "tasks and methods of its own"]),
        ('experiment = "nope"', ["no module 'nope'"]),
        ('experiment = "benchmark.nope"', ["no module 'benchmark.nope'"]),
        (MINE + "[settings.dppo]\nclip_coef = 0.1", ["'dppo'", "not one of its methods: frozen, idql"]),
        (MINE + "[settings.idql]\nreply_ratio = 3.0", ["'idql'", "'reply_ratio'", "valid", "replay_ratio"]),
        (MINE + "[common_settings]\nreply_ratio = 3.0", ["reply_ratio", "none of", "frozen, idql"]),
        (MINE + '[common_settings]\nreplay_ratio = "3"', ["replay_ratio", "float", "'3'"]),
        (MINE + "[settings.idql]\ncritic_hidden_dims = [64.5]", ["critic_hidden_dims", "int", "64.5"]),
        (MINE + '[task_seeds]\nhoper-local = "0-4"', ["'hoper-local'", "not one of its tasks: toy"]),
        (MINE + "[task_loop]\nhoper-local = { iterations = 2 }", ["'hoper-local'", "not one of its tasks: toy"]),
        (MINE + "[task_loop]\ntoy = 3", ["task_loop.toy", "dict", "3"]),
    ],
)
def test_a_bad_suite_of_ones_own_is_one_line(text: str, words: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert call(tmp_path / "out", suite=str(tmp_path / "mine.toml")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_suite_file_that_is_not_there_is_named(tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "out", suite=str(tmp_path / "none.toml")) == 2
    assert "none.toml: No such file" in capsys.readouterr().err


def test_the_arms_that_are_promised_are_there() -> None:
    assert set(ARMS) >= {"otpr", "dppo", "idql", "dql", "dql-dppo", "frozen"}


def test_status_shows_brackets_as_they_are_and_who_shows_no_sign_of_life(tmp_path: Path, capsys) -> None:
    root = tmp_path / "toy" / "frozen" / "seed-0"
    write_json(root / "spec.json", {})
    write_json(root / "status.json", {"state": "failed", "error": "OSError: cannot open [/data/x]"})
    write_json(tmp_path / "toy" / "frozen" / "seed-1" / "spec.json", {})
    write_json(tmp_path / "toy" / "frozen" / "seed-1" / "status.json", {"state": "running", "heartbeat": 1.0})
    assert status.main(status.Arguments(out=tmp_path)) == 1
    shown = capsys.readouterr().out
    assert "cannot open [/data/x]" in shown and "no sign of life for" in shown
    assert status.main(status.Arguments(out=tmp_path, watch=True)) == 1  # it does not wait for the dead


def test_status_of_what_is_no_run_or_says_nothing(tmp_path: Path, capsys) -> None:
    for name, values in (("seed-0", {"iteration": 3}), ("seed-0-backup", {"state": "done"}), ("seed-1", {})):
        write_json(tmp_path / "toy" / "frozen" / name / "spec.json", {})
        write_json(tmp_path / "toy" / "frozen" / name / "status.json", values)
    assert status.main(status.Arguments(out=tmp_path, json=True)) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [(row["seed"], row["state"]) for row in shown] == [(0, "unknown"), (1, "unknown")]
