"""DPPO's checkpoints in and out: the same policy to the bit, every method on it, refusals, nothing half-written."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import toy_spec
from parity_cases import CASES, FOLDER, Case

from benchmark.data.__main__ import main
from benchmark.dppo_files import dppo_network_state, export_policy, import_policy
from benchmark.finetune import Trainer
from benchmark.policies import FOLDER as POLICIES
from benchmark.policies import installed_path, load_pretrained
from benchmark.store import read_json
from benchmark.tasks import NetworkSettings, Task, get_task
from otpr.denoisers import DenoisingMLP, TwoStageMLP
from otpr.diffusion import DiffusionPolicy, SamplerSettings

PRETRAINED, FINE_TUNED = "state_200.pt", "ppo_state_10.pt"
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))


def case_task(case: Case) -> Task:
    sizes = NetworkSettings((64, 64, 64), case.activation, 16, case.cond_mlp_dims)
    return dataclasses.replace(
        get_task("toy"), name=case.name, observation_dim=case.observation_dim, action_dim=case.action_dim, network=sizes
    )


def ranges(task: Task) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    low, high = rng.uniform(-3, -1, task.observation_dim), rng.uniform(1, 3, task.observation_dim)
    ones = np.ones(task.action_dim)
    return {"obs_min": low, "obs_max": high, "action_min": -ones, "action_max": ones}


def lay_out(folder: Path, case: Case, file: str, **changes: Any) -> Path:
    """A checkpoint of the case with its normalisation beside it."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "normalization.npz", **(ranges(case_task(case)) | changes))
    return Path(shutil.copy(FOLDER / case.name / file, folder / file))


def network(case: Case, part: Any) -> DenoisingMLP:
    built = case.network()
    file = PRETRAINED if part == "ema" else FINE_TUNED
    built.load_state_dict(dppo_network_state(FOLDER / case.name / file, part))
    return built


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@by_case
def test_an_imported_pretrained_policy_is_the_average(case: Case, tmp_path: Path) -> None:
    task = case_task(case)
    target = import_policy(lay_out(tmp_path, case, PRETRAINED), task)
    assert target == installed_path(task)
    held = load_pretrained(task)
    assert_equal(held.policy.network.state_dict(), network(case, "ema").state_dict())
    expected = ranges(task)
    np.testing.assert_array_equal(held.normalizer.observation_min, expected["obs_min"].astype(np.float32))
    np.testing.assert_array_equal(held.normalizer.action_max, expected["action_max"].astype(np.float32))
    card = read_json(target.with_suffix(".json"))
    assert (card["kind"], card["epoch"], card["source"], card["data_digest"]) == ("pre-trained", 200, PRETRAINED, "")
    assert card["sha256"] == held.digest and len(card["source_sha256"]) == 64


@by_case
@pytest.mark.parametrize("late_steps", [5, 10, 20])
def test_an_imported_fine_tuned_policy_samples_as_dppo_does(case: Case, late_steps: int, tmp_path: Path) -> None:
    task = case_task(case)
    import_policy(lay_out(tmp_path, case, FINE_TUNED), task, ft_denoising_steps=late_steps)
    held = load_pretrained(task).policy
    frozen, tuned = (DiffusionPolicy(network(case, part)) for part in ("actor", "actor_ft"))
    generator = torch.Generator().manual_seed(1)
    observations, noise = torch.randn(16, case.observation_dim, generator=generator), held.draw_noise(16, generator)
    for explore in (False, True):
        expected = tuned.sample_chain(observations, noise, explore, keep=late_steps, early=frozen)[:, -1]
        assert torch.equal(held.sample_chain(observations, noise, explore, keep=0)[:, -1], expected)
        if late_steps < 20:
            assert not torch.equal(tuned.sample_chain(observations, noise, explore, keep=0)[:, -1], expected)
    steps = torch.arange(20)[torch.randint(20, (16,), generator=generator)]
    mixed = held.network(noise[0], steps, observations)
    late = (steps < late_steps).view(-1, 1, 1)
    stages = (policy.network(noise[0], steps, observations) for policy in (tuned, frozen))
    assert torch.equal(mixed, torch.where(late, *stages))
    card = read_json(installed_path(task).with_suffix(".json"))
    assert (card["kind"], card["itr"], card["ft_denoising_steps"]) == ("fine-tuned", 10, late_steps)


def test_ddim_takes_the_late_network_at_the_late_steps_of_the_schedule() -> None:
    case, sampler = CASES[0], SamplerSettings(kind="ddim", ddim_steps=5)  # k = 16, 12, 8, 4, 0
    frozen, tuned = (DiffusionPolicy(network(case, part), sampler) for part in ("actor", "actor_ft"))
    both = DiffusionPolicy(TwoStageMLP(network(case, "actor"), network(case, "actor_ft"), 10), sampler)
    observations, noise = torch.zeros(4, 11), both.draw_noise(4, torch.Generator().manual_seed(0))
    expected = tuned.sample_chain(observations, noise, False, keep=3, early=frozen)[:, -1]
    assert torch.equal(both.sample_chain(observations, noise, False, keep=0)[:, -1], expected)


def test_stages_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="same"):
        TwoStageMLP(CASES[0].network(), CASES[1].network(), 10)
    with pytest.raises(ValueError, match="late_steps"):
        TwoStageMLP(CASES[0].network(), CASES[0].network(), 0)


@by_case
@pytest.mark.parametrize("file", [PRETRAINED, FINE_TUNED])
def test_round_trips_keep_every_bit(case: Case, file: str, tmp_path: Path) -> None:
    task, source = case_task(case), lay_out(tmp_path / "source", case, file)
    target = import_policy(source, task)
    installed = torch.load(target, weights_only=True)
    statistics = export_policy(task, tmp_path / "exported" / "state.pt")
    theirs = torch.load(source, weights_only=True)
    ours = torch.load(tmp_path / "exported" / "state.pt", weights_only=True)
    if file == PRETRAINED:
        assert ours.keys() == {"epoch", "model", "ema"} and ours["epoch"] == theirs["epoch"]
        assert_equal(ours["ema"], theirs["ema"])
        assert ours["model"].keys() == theirs["model"].keys()
    else:
        assert ours.keys() == {"itr", "model"} and ours["itr"] == theirs["itr"]
        assert_equal(ours["model"], {k: v for k, v in theirs["model"].items() if not k.startswith("critic.")})
    with np.load(statistics) as archive:
        for name, value in ranges(task).items():
            np.testing.assert_array_equal(archive[name], value.astype(np.float32), strict=True)
    target.unlink()
    again = torch.load(import_policy(tmp_path / "exported" / "state.pt", task), weights_only=True)
    for entry in ("ema", "early", "normalization"):
        if entry in installed:
            assert_equal(installed[entry], again[entry])


def test_our_own_policy_goes_out_and_comes_back(tmp_path: Path) -> None:
    task = get_task("toy")
    before = load_pretrained(task)
    export_policy(task, tmp_path / "state_0.pt")
    import_policy(tmp_path / "state_0.pt", task)
    after = load_pretrained(task)
    assert_equal(before.policy.state_dict(), after.policy.state_dict())
    for name, value in vars(before.normalizer).items():
        np.testing.assert_array_equal(value, getattr(after.normalizer, name), strict=True)


def test_an_export_leaves_the_normalisation_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "normalization.npz").write_bytes(b"of another policy")
    with pytest.raises(ValueError, match="another folder"):
        export_policy(get_task("toy"), tmp_path / "state_0.pt")
    assert not (tmp_path / "state_0.pt").exists()


def fine_tuned_toy(folder: Path) -> None:
    """Make toy start from a fine-tuned policy: its own, with a slightly different network in the last steps."""
    task = get_task("toy")
    export_policy(task, folder / "state_0.pt")
    weights = dppo_network_state(folder / "state_0.pt", "ema")
    generator = torch.Generator().manual_seed(0)
    tuned = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    parts = {"network": weights, "actor": weights, "actor_ft": tuned}
    model = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    torch.save({"itr": 3, "model": model}, folder / "state_3.pt")
    import_policy(folder / "state_3.pt", task)
    pairs = "toy-expert.pt"  # the normalisation is the same
    shutil.copy(POLICIES / pairs, installed_path(task).with_name(pairs))


def test_every_method_learns_from_a_fine_tuned_start(distinct_arm: str, tmp_path: Path) -> None:
    fine_tuned_toy(tmp_path)
    trainer = Trainer(toy_spec(distinct_arm, loop={"iterations": 2, "eval_every": 2}))
    actor = getattr(trainer.method, "actor", None)
    before = None if actor is None else {name: value.clone() for name, value in actor.state_dict().items()}
    while not trainer.done:
        trainer.advance()
    trainer.close()
    assert len(trainer.curve) == 2
    if actor is not None:
        assert isinstance(actor.network, TwoStageMLP)
        changed = {name for name, value in actor.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.startswith("network.late.") for name in changed)
        assert all(value.isfinite().all() for value in actor.state_dict().values())
        if distinct_arm == "dppo":
            assert not any(name.startswith("network.early.") for name in changed)


def test_an_import_drops_the_expert_pairs_of_the_policy_before(tmp_path: Path) -> None:
    fine_tuned_toy(tmp_path)
    assert installed_path(get_task("toy")).with_name("toy-expert.pt").exists()
    import_policy(tmp_path / "state_3.pt", get_task("toy"))
    assert not installed_path(get_task("toy")).with_name("toy-expert.pt").exists()


def change(path: Path, edit: Callable[[dict], Any]) -> None:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)


BIAS = "network.mlp_mean.layers.0.bias"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "missing": (PRETRAINED, lambda p: p.unlink(), ["no DPPO checkpoint"]),
    "truncated": (PRETRAINED, lambda p: p.write_bytes(p.read_bytes()[:5000]), ["not a DPPO checkpoint"]),
    "pickle": (PRETRAINED, lambda p: torch.save({"ema": Path("x")}, p), ["not a DPPO checkpoint"]),
    "list": (PRETRAINED, lambda p: torch.save([1], p), ["not a DPPO checkpoint"]),
    "shape": (
        PRETRAINED,
        lambda p: change(p, lambda c: c["ema"].update({BIAS: torch.zeros(65)})),
        [BIAS, "(64,)", "(65,)"],
    ),
    "dtype": (PRETRAINED, lambda p: change(p, lambda c: c["ema"].update({BIAS: torch.zeros(64).half()})), [BIAS, "16"]),
    "nan": (PRETRAINED, lambda p: change(p, lambda c: c["ema"][BIAS].fill_(np.nan)), [BIAS, "finite"]),
    "lacks": (PRETRAINED, lambda p: change(p, lambda c: c["ema"].pop(BIAS)), ["lacks", BIAS]),
    "extra": (
        PRETRAINED,
        lambda p: change(p, lambda c: c["ema"].update({"network.extra": torch.zeros(1)})),
        ["has network.extra"],
    ),
    "epoch": (PRETRAINED, lambda p: change(p, lambda c: c.update(epoch="last")), ["epoch", "last"]),
    "no-actor": (
        FINE_TUNED,
        lambda p: change(p, lambda c: [c["model"].pop(k) for k in list(c["model"]) if k.startswith("actor.")]),
        ["actor.*"],
    ),
    "early-shape": (
        FINE_TUNED,
        lambda p: change(p, lambda c: c["model"].update({"actor.mlp_mean.layers.0.bias": torch.zeros(1)})),
        ["early", BIAS, "(64,)", "(1,)"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_one_line_and_leave_no_trace(name: str, tmp_path: Path) -> None:
    file, damage, words = DAMAGE[name]
    path = lay_out(tmp_path, CASES[0], file)
    damage(path)
    refuse(path, words)


def refuse(path: Path, words: list[str], case: Case = CASES[0], **options: Any) -> None:
    with pytest.raises(ValueError) as raised:
        import_policy(path, case_task(case), **options)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not installed_path(case_task(case)).parent.exists()


def test_a_checkpoint_of_another_task_is_refused_by_its_first_unfit_parameter(tmp_path: Path) -> None:
    path = lay_out(tmp_path, CASES[0], PRETRAINED)
    np.savez(tmp_path / "normalization.npz", **ranges(case_task(CASES[1])))
    refuse(path, ["cond_mlp"], CASES[1])


@pytest.mark.parametrize("steps", [0, 21])
def test_late_steps_must_be_steps_of_the_schedule(steps: int, tmp_path: Path) -> None:
    refuse(lay_out(tmp_path, CASES[0], FINE_TUNED), ["1..20", str(steps)], ft_denoising_steps=steps)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs_min": np.zeros(12)}, ["obs_min", "(11,)", "(12,)"]),
        ({"action_max": np.ones(3, dtype=int)}, ["action_max", "int64"]),
        ({"obs_max": np.full(11, np.inf)}, ["obs_max", "finite"]),
        ({"action_min": np.full(3, 2.0)}, ["action_min is above action_max", "dimension 0"]),
        ({"obs_min": np.array([Path("x")] * 11, dtype=object)}, ["normalization.npz"]),
        ({"obs_min": np.zeros(1_000_000)}, ["unpacks to", "bytes"]),
    ],
)
def test_damaged_normalisation_is_one_line(changes: dict, words: list[str], tmp_path: Path) -> None:
    refuse(lay_out(tmp_path, CASES[0], PRETRAINED, **changes), words)


def test_missing_or_foreign_normalisation_is_one_line(tmp_path: Path) -> None:
    path = lay_out(tmp_path, CASES[0], PRETRAINED)
    refuse(path, ["elsewhere.npz", "no normalisation"], normalization=tmp_path / "elsewhere.npz")
    np.savez(tmp_path / "other.npz", obs_min=np.zeros(11))
    refuse(path, ["other.npz", "obs_max"], normalization=tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    refuse(path, ["text.npz", "normalization.npz of DPPO"], normalization=tmp_path / "text.npz")


def test_a_full_disk_leaves_no_policy_without_its_card(tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    task = case_task(CASES[0])
    file, place = lay_out(tmp_path, CASES[0], PRETRAINED), installed_path(task)

    def refused() -> None:
        for name in ("write_json", "write_bytes"):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
                patch.setattr(f"benchmark.policies.{name}", full)
                import_policy(file, task)

    refused()
    assert not list(place.parent.glob("*"))
    import_policy(file, task)
    before = {path.name: path.read_bytes() for path in place.parent.iterdir()}
    refused()  # and the earlier policy stays
    assert len(before) == 2 and before == {path.name: path.read_bytes() for path in place.parent.iterdir()}


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.data", *arguments])
    return main()


def test_the_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "dppo" / "state_0.pt"
    assert command(monkeypatch, "export-policy", "toy", "--out", str(out)) == 0
    assert command(monkeypatch, "import-policy", str(out), "--task", "toy") == 0
    assert "pre-trained policy (epoch 0)" in capsys.readouterr().out
    assert installed_path(get_task("toy")).exists()
    (tmp_path / "other" / "folder").mkdir(parents=True)
    assert command(monkeypatch, "export-policy", "toy", "--out", str(tmp_path / "other" / "folder")) == 2
    assert "is a directory" in capsys.readouterr().err and not (tmp_path / "other" / "normalization.npz").exists()
    assert command(monkeypatch, "import-policy", str(out), "--task", "hopper-local") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "obs_min" in error
    assert command(monkeypatch, "import-policy", str(out), "--task", "ant") == 2
