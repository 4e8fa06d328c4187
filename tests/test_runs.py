"""Promises about runs: same spec same curve, kill and resume, faults that become states."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import toy_spec
from torch import Tensor

from benchmark.finetune import Trainer
from benchmark.launch.execute import execute
from benchmark.launch.lease import Lease, RunBusy
from benchmark.launch.local import Pool, run_inline
from benchmark.plan import plan_runs, prepare
from benchmark.store import RunPaths, load_checkpoint, read_json, save_checkpoint, write_json
from otpr.method import ActionChunk


def rows(path: Path) -> list[dict[str, str]]:
    """CSV rows without what is measured in seconds."""
    with path.open() as file:
        return [
            {k: v for k, v in row.items() if k != "wall_seconds" and not k.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def results(paths: RunPaths) -> tuple[list[dict[str, str]], ...]:
    files = (paths.curve, paths.metrics, paths.evaluations)
    return tuple(rows(path) if path.exists() else [] for path in files)


def test_a_rollout_keeps_what_a_method_adds_as_it_is() -> None:
    collector = Trainer(toy_spec("idql")).collector
    added = {"index": torch.full((8, 3), 2**60), "explored": torch.ones(8, dtype=torch.bool)}

    def act(observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        return ActionChunk(torch.zeros(8, 4, 2), added)

    extras = collector.collect(act).extras
    for name, values in added.items():
        assert torch.equal(extras[name], values.expand(4, *values.shape))


def test_same_spec_same_curve_whatever_the_launcher(prepared) -> None:
    inline, pooled = prepared("idql", "inline"), prepared("idql", "pool")
    run_inline([inline.paths.root], lambda: None)
    Pool(1, lambda: None).run([pooled.paths.root])
    assert results(inline.paths) == results(pooled.paths)
    assert [row["iteration"] for row in rows(inline.paths.curve)] == ["0", "2", "4", "6"]


def test_another_seed_gives_another_curve(prepared) -> None:
    first, second = prepared("dppo"), prepared("dppo", seed=1)
    run_inline([first.paths.root, second.paths.root], lambda: None)
    assert rows(first.paths.metrics) != rows(second.paths.metrics)


@pytest.mark.parametrize("most", [3, pytest.param(13, marks=pytest.mark.slow)])  # 104 over all arms
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(most: int, distinct_arm: str, prepared) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark.launch.execute", "benchmark.methods", "otpr.agent", "baselines.dql"])
    rules = {"evaluate_rules": True}
    whole, run = prepared(distinct_arm, "whole", loop=rules), prepared(distinct_arm, "killed", loop=rules)
    execute(whole.paths.root)
    spec, kills, resumed = read_json(run.paths.spec), 0, 0
    generator = np.random.default_rng(7)
    while kills < most or read_json(run.paths.status)["state"] != "done":
        if read_json(run.paths.status)["state"] == "done":
            assert results(run.paths) == results(whole.paths)
            shutil.rmtree(run.paths.root)
            write_json(run.paths.spec, spec)
        process = context.Process(target=execute, args=(run.paths.root, 0.0))
        process.start()
        if kills < most:
            time.sleep(generator.uniform(0.05, 0.8))
            if process.is_alive():
                process.kill()
                kills += 1
        process.join()
        resumed += run.paths.checkpoint.exists()
        if not run.paths.status.exists():
            write_json(run.paths.status, {"state": "queued"})
    assert results(run.paths) == results(whole.paths)
    assert resumed > 0


def test_other_rules_play_the_same_episodes_beside_the_methods_own(prepared) -> None:
    run, plain = prepared("idql", "rules", loop={"evaluate_rules": True}), prepared("idql", "plain")
    execute(run.paths.root)
    execute(plain.paths.root)
    assert rows(run.paths.curve) == rows(plain.paths.curve)
    assert not plain.paths.evaluations.exists()
    recorded = rows(run.paths.evaluations)
    assert [(row["iteration"], row["rule"]) for row in recorded] == [
        (iteration, rule) for iteration in "246" for rule in ("actor", "best_q")
    ]
    own = {row["iteration"]: row["return_mean"] for row in rows(run.paths.curve)}
    best = {row["iteration"]: row["return_mean"] for row in recorded if row["rule"] == "best_q"}
    assert best == {iteration: own[iteration] for iteration in "246"}  # it is the rule of IDQL


def test_a_run_made_before_a_setting_existed_goes_on(prepared) -> None:
    run, whole = prepared("idql"), prepared("idql", "whole")
    execute(whole.paths.root)
    content = read_json(run.paths.spec)
    del content["demonstrations_digest"], content["digest"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    old = content | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}
    write_json(run.paths.spec, old)
    trainer = Trainer(run.spec)
    for _ in range(3):
        trainer.advance()
    trainer.save(run.paths)
    state = load_checkpoint(run.paths.checkpoint)
    save_checkpoint(run.paths, state | {"digest": old["digest"]})
    (planned,) = plan_runs([run.spec], run.paths.root.parents[2])
    prepare(planned)
    assert read_json(run.paths.spec) == old
    assert execute(run.paths.root) == "done"
    assert results(run.paths) == results(whole.paths)


def test_learners_leave_the_frozen_curve(arm: str, prepared) -> None:
    frozen, run = prepared("frozen", "frozen"), prepared(arm)
    execute(frozen.paths.root)
    execute(run.paths.root)
    reference, curve = rows(frozen.paths.curve), rows(run.paths.curve)
    assert curve[0] == reference[0]
    assert len({row["return_mean"] for row in reference}) == 1 and len(reference) == 4
    method = Trainer(run.spec)
    method.restore(run.paths)
    moved = any(
        not torch.equal(a, b)
        for a, b in zip(
            getattr(method.method, "actor", method.pretrained.policy).parameters(),
            method.pretrained.policy.parameters(),
            strict=True,
        )
    )
    assert moved == (arm != "frozen")


def test_the_collected_transition_keeps_the_episodes_own_final_observation() -> None:
    trainer = Trainer(toy_spec("idql"))
    firsts = []
    for _ in range(20):
        rollout = trainer.collector.collect(trainer.method.act)
        ended = rollout.terminated | rollout.truncated
        following = rollout.next_observations[:-1], rollout.observations[1:]
        same = (following[0] == following[1]).all(-1)
        assert same[~ended[:-1]].all()
        assert not same[ended[:-1]].any()
        firsts.append(ended.any().item())
        assert not (rollout.terminated & rollout.truncated).any()
    assert any(firsts)


def test_environments_start_anew_at_each_iteration_where_asked() -> None:
    for reset in (False, True):
        trainer = Trainer(toy_spec("idql", loop={"reset_at_iteration": reset}))
        before = trainer.collector.collect(trainer.method.act)
        last, ended = before.next_observations[-1].clone(), (before.terminated | before.truncated)[-1]
        goes_on = (trainer.collector.collect(trainer.method.act).observations[0] == last).all(-1)
        assert goes_on[~ended].all() != reset
        assert not (reset and goes_on.any())


def test_divergence_is_a_state_and_the_others_go_on(prepared) -> None:
    bad, good = prepared("dppo", actor_learning_rate=1e30), prepared("frozen")
    Pool(1, lambda: None).run([bad.paths.root, good.paths.root])
    status = read_json(bad.paths.status)
    assert status["state"] == "diverged" and "not finite" in status["error"]
    assert read_json(good.paths.status)["state"] == "done"


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_unreadable_checkpoint_fails_with_one_line_and_is_kept(damage: str, prepared) -> None:
    run, other = prepared("idql"), prepared("dppo")
    execute(run.paths.root)
    content = run.paths.checkpoint.read_bytes()[:-1000]
    if damage == "other":
        execute(other.paths.root)
        content = other.paths.checkpoint.read_bytes()
    run.paths.checkpoint.write_bytes(content)
    write_json(run.paths.status, {"state": "queued"})
    assert execute(run.paths.root) == "failed"
    error = read_json(run.paths.status)["error"]
    assert "checkpoint" in error and "\n" not in error
    assert run.paths.checkpoint.read_bytes() == content


def test_a_run_is_never_executed_twice_at_once(prepared) -> None:
    run = prepared("frozen")
    with Lease(run.paths.lock), pytest.raises(RunBusy, match="another process"):
        execute(run.paths.root)
    assert execute(run.paths.root) == "done"


def test_checkpoint_loads_without_pickle_and_belongs_to_its_spec(arm: str, prepared) -> None:
    run = prepared(arm)
    execute(run.paths.root)
    assert load_checkpoint(run.paths.checkpoint)["digest"] == run.spec.digest


def test_a_process_that_dies_is_a_failed_run(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared("dppo")
    spec = read_json(run.paths.spec)
    write_json(run.paths.spec, spec | {"seed": 5})  # its digest no longer fits
    Pool(1, lambda: None).run([run.paths.root])
    status = read_json(run.paths.status)
    assert status["state"] == "failed" and "digest" in status["error"]
