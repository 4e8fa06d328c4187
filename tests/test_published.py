"""The published tasks with the published settings, field by field: DPPO, and IDQL and DQL as its authors ran them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import toy_spec

from benchmark import run
from benchmark.estimate import run_hours, weights_per_row
from benchmark.plan import choose, make_specs
from benchmark.suites import load_suite, suite_names
from benchmark.tasks import TASKS, get_task

GYM = ("hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2")
KITCHEN = ("kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0")
ROBOMIMIC = ("lift", "can", "square", "transport")
PUBLISHED = (*GYM, *KITCHEN, *ROBOMIMIC)

# dims, horizon, limit, environments, chunks, training iterations, total steps; DPPO's batch, epochs, gradient steps
SIZES: dict[str, tuple[Any, ...]] = {
    "hopper-medium-v2": (11, 3, 4, 1000, 40, 500, 900, 72.0e6, 50_000, 5, 20),
    "walker2d-medium-v2": (17, 6, 4, 1000, 40, 500, 900, 72.0e6, 50_000, 5, 20),
    "halfcheetah-medium-v2": (17, 6, 4, 1000, 40, 500, 900, 72.0e6, 50_000, 5, 20),
    "kitchen-complete-v0": (60, 9, 4, 280, 40, 70, 270, 3.024e6, 5600, 10, 50),
    "kitchen-partial-v0": (60, 9, 4, 280, 40, 70, 270, 3.024e6, 5600, 10, 50),
    "kitchen-mixed-v0": (60, 9, 4, 280, 40, 70, 270, 3.024e6, 5600, 10, 50),
    "lift": (19, 7, 4, 300, 50, 300, 72, 4.32e6, 7500, 10, 200),
    "can": (23, 7, 4, 300, 50, 300, 135, 8.1e6, 7500, 10, 200),
    "square": (23, 7, 4, 400, 50, 400, 180, 14.4e6, 10_000, 10, 200),
    "transport": (59, 14, 8, 800, 50, 400, 180, 28.8e6, 10_000, 5, 100),
}
# hidden widths, activation, time dimension, widths of the network of the condition
NETWORKS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(GYM, ((512,) * 3, "relu", 16, ())),
    **dict.fromkeys(KITCHEN, ((256,) * 3, "mish", 16, (128, 32))),
    "lift": ((512,) * 3, "mish", 16, ()),
    "can": ((512,) * 3, "mish", 16, ()),
    "square": ((1024,) * 3, "mish", 32, (512, 64)),
    "transport": ((1024,) * 3, "mish", 32, ()),
}


@pytest.fixture(scope="module")
def specs() -> dict[tuple[str, str], Any]:
    """The plan of suite `all`, one spec for each task and method."""
    made = make_specs(choose(load_suite("all"), (), (), None), {}, "cpu", plan_only=True)
    return {(spec.task, spec.method): spec for spec in made}


def test_a_method_of_another_package_may_name_its_settings_as_ours_are_named() -> None:
    spec = toy_spec("frozen")
    for settings in ({"update_epochs": 3}, {"replay_ratio": 4}):
        assert run_hours(replace(spec, settings=settings)) == run_hours(spec)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_task_loop_and_network(name: str, specs: dict[tuple[str, str], Any]) -> None:
    task, spec = TASKS[name], specs[name, "dppo"]
    loop, settings = spec.loop, spec.settings
    steps = loop.n_envs * loop.n_steps * task.action_horizon * loop.iterations
    pairs = loop.n_envs * loop.n_steps * settings["ft_denoising_steps"]
    gradient_steps = pairs // settings["batch_size"] * settings["update_epochs"]
    assert SIZES[name] == (
        task.observation_dim, task.action_dim, task.action_horizon, task.max_episode_steps, loop.n_envs, loop.n_steps,
        loop.iterations, steps, settings["batch_size"], settings["update_epochs"], gradient_steps,
    )  # fmt: skip
    network = task.network
    assert NETWORKS[name] == (network.hidden_dims, network.activation, network.time_dim, network.cond_mlp_dims)
    assert spec.sampler.denoising_steps == 20
    assert loop.eval_every == 9  # every tenth of DPPO's iterations evaluates instead of training
    assert loop.reset_at_iteration == (name in ROBOMIMIC)


def test_embedded_suites_sample_in_five_steps_of_which_dppo_fine_tunes_all() -> None:
    suites = [suite for suite in map(load_suite, suite_names()) if suite.protocol == "embedded" and suite.tasks]
    specs = [spec for suite in suites for spec in make_specs([suite], {}, "cpu", plan_only=True)]
    assert len(suites) >= 6
    assert {(spec.sampler.kind, spec.sampler.ddim_steps) for spec in specs} == {("ddim", 5)}
    assert {spec.settings["ft_denoising_steps"] for spec in specs if spec.method == "dppo"} == {5}


def test_embedded_suites_warm_up_for_a_tenth_of_their_budget_at_most() -> None:
    exceptions = {}
    for suite in ("smoke", "quick", "quick-lift", "local", "otpr-check"):
        for spec in make_specs(choose(load_suite(suite), (), (), None), {}, "cpu", plan_only=True):
            warmup = spec.settings.get("critic_warmup_iterations", 0)
            if warmup > 0.1 * spec.loop.iterations:
                exceptions[suite, spec.method] = (warmup, spec.loop.iterations)
    # named in results/README.md: a shorter warm-up lets IDQL choose by a critic that has not learned
    assert exceptions == {
        ("quick-lift", "dppo"): (2, 15),
        ("quick-lift", "dql"): (4, 15),
        ("quick-lift", "idql"): (4, 15),
        ("quick-lift", "otpr"): (4, 15),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_dppo(name: str, specs: dict[tuple[str, str], Any]) -> None:
    settings, robomimic = specs[name, "dppo"].settings, name in ROBOMIMIC
    expected = {
        "ft_denoising_steps": 10, "denoising_discount": 0.99, "gae_lambda": 0.95, "actor_learning_rate": 1e-4,
        "critic_learning_rate": 1e-3, "critic_hidden_dims": (256, 256, 256), "target_kl": 1.0, "vf_coef": 0.5,
        "discount": 0.999 if robomimic else 0.99, "clip_base": 0.001 if robomimic else 0.01, "clip_coef": 0.01,
        "clip_rate": 3.0, "reward_scaling": True,
        "critic_warmup_iterations": 1 if robomimic else 0,  # of 2, one is the evaluation at iteration 0
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_idql_and_dql(name: str, specs: dict[tuple[str, str], Any]) -> None:
    idql, dql, robomimic = specs[name, "idql"].settings, specs[name, "dql"].settings, name in ROBOMIMIC
    common = {
        "batch_size": 1000, "critic_learning_rate": 1e-3, "critic_warmup_iterations": 4, "q_residual": False,
        "actor_learning_rate": 1e-5 if robomimic else 1e-4, "discount": 0.999 if robomimic else 0.99,
        "reward_scale": 0.01 if name in GYM else 1.0,  # kitchen: ours, since nobody published settings there
        "critic_hidden_dims": (256, 256, 256),
    }  # fmt: skip
    assert {key: idql[key] for key in common} == {key: dql[key] for key in common} == common
    assert (idql["candidates"], idql["replay_capacity"]) == ((10, 250_000) if robomimic else (20, 1_000_000))
    assert (idql["replay_ratio"], idql["expectile"], idql["exploration_weight"], idql["critic_tau"]) == (
        128, 0.8, 0.7, 0.001,
    )  # fmt: skip
    assert (dql["replay_ratio"], dql["eta"], dql["target_ema"], dql["replay_capacity"]) == (16, 1.0, 0.005, 1_000_000)
    assert (dql["bc_on"], specs[name, "dql-dppo"].settings["bc_on"]) == ("replay", "policy")
    loop = specs[name, "idql"].loop
    per_iteration = {settings["replay_ratio"]: loop.n_envs * loop.n_steps * settings["replay_ratio"] // 1000
                     for settings in (idql, dql)}  # fmt: skip
    expected = {"lift": (1920, 240), "can": (1920, 240)}.get(name, (358, 44) if name in KITCHEN else (2560, 320))
    assert tuple(per_iteration.values()) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_pre_training(name: str) -> None:
    settings = TASKS[name].pretraining
    robomimic = name in ROBOMIMIC
    batch = 256 if robomimic or name == "kitchen-mixed-v0" else 128
    rates = (1e-4, 1e-5, 100) if robomimic else (1e-3, 1e-4, 1)
    decay = 1e-5 if name == "kitchen-partial-v0" else 1e-6
    assert (settings.epochs, settings.batch_size, settings.weight_decay) == (200 if name in GYM else 3000, batch, decay)
    assert (settings.learning_rate, settings.final_learning_rate, settings.warmup_epochs) == rates
    assert (settings.ema_decay, settings.ema_every, settings.ema_start_epochs) == (0.995, 10, 20)
    steps = settings.in_steps(1_000 * batch)
    assert (steps.gradient_steps, steps.ema_start) == (settings.epochs * 1_000, 20_000)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("hopper-medium-v2", -20.272305, 3234.3), ("walker2d-medium-v2", 1.629008, 4592.3),
     ("halfcheetah-medium-v2", -280.178953, 12135.0), ("kitchen-mixed-v0", 0.0, 4.0)],
)  # fmt: skip
def test_scores_are_the_fields(name: str, low: float, high: float) -> None:
    task = get_task(name)
    assert task.score(low, None) == 0.0
    assert task.score(high, None) == 1.0
    assert task.score((low + high) / 2, None) == pytest.approx(0.5)
    assert get_task("can").score(123.0, 0.25) == 0.25  # success is the score where rewards are sparse


def test_dry_run_of_all_lists_every_task_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))
    assert run.main(run.Arguments(suite="all", out=tmp_path / "out", dry_run=True, device="cpu")) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for name in PUBLISHED:
        for method in ("frozen", "otpr", "dppo", "idql", "dql"):
            assert any(line.split()[:2] == [name, method] for line in text.splitlines()), (name, method)
        assert f"python -m benchmark.data get {name}" in text or name in text.split("no data, no policy")[0]
    assert "72,000,000 steps" in text
    assert "28,800,000 steps" in text
    assert "--suite local" in text


def test_hours_grow_with_the_work(specs: dict[tuple[str, str], Any]) -> None:
    hours = {method: run_hours(specs["can", method]) for method in ("frozen", "dppo", "idql", "dql")}
    assert hours["frozen"] < hours["dppo"] < hours["idql"]
    assert hours["frozen"] < hours["dql"]
    assert run_hours(specs["transport", "dppo"]) > run_hours(specs["can", "dppo"])
    weights = {n: p.numel() for n, p in _network("can").named_parameters() if "weight" in n and "time" not in n}
    assert weights_per_row(get_task("can")) == sum(n for name, n in weights.items() if "l2" not in name)


def _network(name: str) -> Any:
    import torch

    return get_task(name).build_network(torch.Generator())
