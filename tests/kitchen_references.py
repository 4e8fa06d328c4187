"""Two references for the kitchen: D4RL's rules written out step by step, and D4RL's own code out of its wheel.

D4RL's package cannot be imported as it is: it asks for dm_control, mujoco_py, gym and others that today's MuJoCo leaves
behind. Here its kitchen modules run unchanged, with stand-ins for what they import and for the few calls that they make
to dm_control, which are MuJoCo's. Its XML names a top-level default class, which today's MuJoCo refuses; the copy that
is loaded calls that class main, as older versions did.
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

import collections.abc
import importlib
import importlib.util
import os
import shutil
import sys
import warnings
import xml.etree.ElementTree
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
from gymnasium.utils import seeding

MODULE = "d4rl.kitchen.kitchen_envs"
ROBOT_MODULE = "d4rl.kitchen.adept_envs.franka.robot.franka_robot"
CLASSES = {
    "kitchen-microwave-kettle-light-slider": "KitchenMicrowaveKettleLightSliderV0",
    "kitchen-microwave-kettle-bottomburner-light": "KitchenMicrowaveKettleBottomBurnerLightV0",
}


class WrittenOut:
    """D4RL's rules in plain Python on a model of gymnasium-robotics, read off D4RL's source."""

    def __init__(self, sub_tasks: tuple[str, ...]) -> None:
        folder = Path(importlib.util.find_spec("gymnasium_robotics").origin).parent / "envs/assets/kitchen_franka"
        self.model = mujoco.MjModel.from_xml_path(str(folder / "kitchen_assets/kitchen_env_model.xml"))
        self.model.geom_contype[1] = self.model.geom_conaffinity[1] = 0  # the pedestal
        self.model.body_contype[1] = self.model.body_conaffinity[1] = 0
        self.data = mujoco.MjData(self.model)
        config = xml.etree.ElementTree.parse(folder / "franka_assets/franka_config.xml").getroot()
        joints = [config.find(f"qpos{i}") for i in range(30)]
        self.bounds = np.array([[float(x) for x in joint.get("pos_bound").split()] for joint in joints[:9]])
        self.amplitudes = np.array([float(joint.get("pos_noise_amp")) for joint in joints])
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env  # prints, hence late

        self.places, self.goals = kitchen_env.OBS_ELEMENT_INDICES, kitchen_env.OBS_ELEMENT_GOALS
        self.sub_tasks = sub_tasks

    def reset(self, seed: int, start: np.ndarray) -> np.ndarray:
        self.random, _ = seeding.np_random(seed)
        self.pending = set(self.sub_tasks)
        mujoco.mj_resetData(self.model, self.data)
        self.model.opt.disableflags = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        mujoco.mj_forward(self.model, self.data)
        self.model.opt.disableflags = 0
        self.data.qpos[:] = start
        mujoco.mj_forward(self.model, self.data)
        for _ in range(5):
            self.observe()
        mujoco.mj_forward(self.model, self.data)
        return self.observe()

    def observe(self) -> np.ndarray:
        robot = self.data.qpos[:9] + 0.1 * self.amplitudes[:9] * self.random.uniform(low=-1.0, high=1.0, size=9)
        self.random.uniform(low=-1.0, high=1.0, size=9)
        objects = self.data.qpos[9:] + 0.1 * self.amplitudes[9:] * self.random.uniform(low=-1.0, high=1.0, size=21)
        self.random.uniform(low=-1.0, high=1.0, size=21)
        goal = np.zeros(30)
        for name in self.sub_tasks:
            goal[self.places[name]] = self.goals[name]
        self.observation = np.concatenate([robot, objects, goal])
        return self.observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        velocity = 2.0 * np.clip(action, -1.0, 1.0).astype(np.float64)
        duration = 40 * self.model.opt.timestep
        target = self.observation[:9] + np.clip(velocity, -10.0, 10.0) * duration
        self.data.ctrl[:] = np.clip(target, self.bounds[:, 0], self.bounds[:, 1])
        for _ in range(int(duration / self.model.opt.timestep)):
            mujoco.mj_step(self.model, self.data)
        observation = self.observe()
        done = [
            name for name in self.pending if np.linalg.norm(observation[self.places[name]] - self.goals[name]) < 0.3
        ]
        self.pending -= set(done)
        return observation, float(len(done)), not self.pending

    def put(self, positions: np.ndarray) -> None:
        self.data.qpos[:] = positions


class Wheel:
    """D4RL's own environment object of one definition, from its unpacked wheel; see `load_wheel`."""

    def __init__(self, module: ModuleType, definition: str) -> None:
        self.env = getattr(module, CLASSES[definition])()

    def reset(self, seed: int, start: np.ndarray) -> np.ndarray:
        np.testing.assert_array_equal(self.env.init_qpos, start)
        self.env.np_random, _ = seeding.np_random(seed)
        return self.env.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        return self.env.step(action)[:3]

    def put(self, positions: np.ndarray) -> None:
        physics = self.env.sim
        physics.data.qpos[:] = positions
        mujoco.mj_step1(physics.model.ptr, physics.data.ptr)  # as dm_control leaves it after every step


def find_wheel() -> Path:
    """The folder above d4rl/kitchen: `OTPR_BENCH_D4RL`, or an installed d4rl. Skips the test where there is none."""
    folder = os.environ.get("OTPR_BENCH_D4RL")
    if folder is None:
        try:
            folder = str(distribution("d4rl").locate_file(""))
        except PackageNotFoundError:
            pytest.skip("needs the files of D4RL's wheel: install d4rl or name the unpacked wheel in OTPR_BENCH_D4RL")
    if not (Path(folder) / "d4rl" / "kitchen" / "kitchen_envs.py").is_file():
        pytest.skip(f"no d4rl/kitchen/kitchen_envs.py below {folder}")
    return Path(folder)


def copy_wheel(source: Path, target: Path) -> Path:
    """A copy of D4RL's kitchen whose XML loads today; returns the XML's path."""
    kitchen = target / "d4rl" / "kitchen"
    shutil.copytree(source / "d4rl" / "kitchen", kitchen, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old in (("kettle_asset.xml", '<default class="kettle">'), ("kettle_chain.xml", 'childclass="kettle"')):
        path = kitchen / "adept_models" / "kitchen" / "assets" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, old.replace("kettle", "main")))
    return kitchen / "adept_envs" / "franka" / "assets" / "franka_kitchen_jntpos_act_ab.xml"


def load_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """D4RL's module of kitchen environments, imported from the copy in `folder` beside stand-ins."""
    for name, members in _stand_ins(folder).items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(collections, "Mapping", collections.abc.Mapping, raising=False)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        module, robot = importlib.import_module(MODULE), importlib.import_module(ROBOT_MODULE)
    read = robot.read_config_from_node  # gives (1,) arrays, which numpy no longer takes for numbers
    monkeypatch.setattr(robot, "read_config_from_node", lambda *names: np.squeeze(read(*names)))
    return module


class Physics:
    """The part of dm_control's Physics that D4RL's kitchen calls, in dm_control's words."""

    def __init__(self, path: str) -> None:
        model = mujoco.MjModel.from_xml_path(path)
        self.model = Proxy(model)
        self.data = Proxy(mujoco.MjData(model))
        self.after_reset()

    @classmethod
    def from_xml_path(cls, path: str) -> Physics:
        return cls(path)

    def reset(self) -> None:
        mujoco.mj_resetData(self.model.ptr, self.data.ptr)
        self.after_reset()

    def after_reset(self) -> None:
        self.model.opt.disableflags = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        self.forward()
        self.model.opt.disableflags = 0

    def forward(self) -> None:
        mujoco.mj_forward(self.model.ptr, self.data.ptr)

    def step(self) -> None:
        mujoco.mj_step2(self.model.ptr, self.data.ptr)
        mujoco.mj_step1(self.model.ptr, self.data.ptr)


class Proxy:
    """A MuJoCo object that takes further attributes, as dm_control's do."""

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ptr, name)


def _stand_ins(folder: Path) -> dict[str, dict[str, Any]]:
    """Modules by name with their members: what D4RL's kitchen imports, as far as it uses it."""

    class Env:
        pass

    class OfflineEnv(Env):
        def __init__(self, **_: Any) -> None:
            pass

    bindings = SimpleNamespace(mjbindings=SimpleNamespace(mjlib=None))
    box = SimpleNamespace(Box=lambda low, high, *_, **__: SimpleNamespace(low=low, high=high))
    return {
        "d4rl": {"__path__": [str(folder / "d4rl")]},
        "d4rl.offline_env": {"OfflineEnv": OfflineEnv},
        "gym": {"Env": Env, "spaces": box},
        "gym.utils": {"seeding": seeding},
        "gym.envs": {},
        "gym.envs.registration": {"register": lambda **_: None, "registry": None},
        "dm_control": {"mujoco": SimpleNamespace(Physics=Physics, wrapper=bindings)},
        "dm_control.mujoco": {"engine": None},
        "termcolor": {"cprint": lambda *_: None},
        "click": {},
        "cElementTree": {"parse": xml.etree.ElementTree.parse},
    }
