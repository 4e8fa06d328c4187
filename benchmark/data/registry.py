"""What datasets there are, what decides or identifies their contents, and where they lie."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmark.seeding import BASE_SEED
from benchmark.store import read_json

GENERATOR_VERSION = 1  # raise it whenever the same recipe would give other numbers
DEMONSTRATORS = Path(__file__).parent / "demonstrators"
Layout = Literal["d4rl", "robomimic"]


@dataclass(frozen=True)
class LocalData:
    """A dataset generated on this machine.

    Attributes:
        task: the task that it is for, and its own name.
        environment: name known to `benchmark.envs.make_env`.
        episodes: whole episodes in it.
        demonstrator: file of the policy that is rolled out, below `DEMONSTRATORS`; None for a scripted demonstrator.
        seed: base seed of resets and actions.
        script: module with ``demonstrate`` and ``SCRIPT_VERSION``, for a scripted demonstrator; None for the toy's.
        layout: of the file.
        noise: share of the demonstrator's standard deviation with which it acts.
    """

    task: str
    environment: str
    episodes: int
    demonstrator: str | None
    description: str
    seed: int = BASE_SEED
    script: str | None = None
    layout: Layout = "d4rl"
    noise: float = 1.0

    def recipe(self) -> dict[str, str | int | float]:
        """Everything that decides the contents.

        Raises:
            ValueError: the demonstrator or its card is missing, or they do not belong together.
        """
        values = {key: getattr(self, key) for key in ("task", "environment", "episodes", "seed")}
        if self.noise != 1.0:
            values["noise"] = self.noise
        return {**values, "generator_version": GENERATOR_VERSION, "demonstrator_sha256": self._demonstrator_digest()}

    def digest(self) -> str:
        """SHA-256 of the recipe: the same on machines whose arithmetic differs in the last bit."""
        canonical = json.dumps(self.recipe(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def demonstrator_path(self) -> Path | None:
        """The demonstrator's file."""
        return DEMONSTRATORS / self.demonstrator if self.demonstrator else None

    def _demonstrator_digest(self) -> str:
        path = self.demonstrator_path()
        if path is None:
            return f"scripted-{importlib.import_module(self.script).SCRIPT_VERSION}" if self.script else "scripted"
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{path}: no demonstrator ({error.strerror})") from error
        if read_json(path.with_suffix(".json")).get("sha256") != digest:
            raise ValueError(f"{path}: not the file that its card describes (SHA-256 {digest[:12]}...)")
        return digest


@dataclass(frozen=True)
class PublishedData:
    """A dataset that others published as one file.

    Where no digest is known here, that of the first file that passes all checks is kept beside the data
    (`benchmark.data.files`), and any other is refused from then on.

    Attributes:
        task: the task that it is for, and its own name.
        layout: of the file.
        address: where it is downloaded from.
        licence: as its publishers state it.
        size: bytes of the file; exact where there is a digest, otherwise roughly.
        episodes: in the file, a last one that is cut off counted; None where no source states it.
        steps: in the file; None where no source states it.
        sha256: of the file; None where no source states it.
        timeouts: whether a file in D4RL's layout must have them.
    """

    task: str
    layout: Layout
    address: str
    licence: str
    size: int
    episodes: int | None
    steps: int | None
    sha256: str | None = None
    timeouts: bool = True

    @property
    def size_text(self) -> str:
        """Its size in megabytes, to be read."""
        return f"{self.size / 1e6:.1f} MB" if self.sha256 else f"about {self.size / 1e6:.0f} MB"


def _gym(robot: str, size: int, episodes: int, sha256: str) -> PublishedData:
    """D4RL's locomotion data of a medium policy, version 2: a million steps, the last episode cut off.

    Sizes and digests as in TensorFlow Datasets (``d4rl_mujoco_*/checksums.tsv``). D4RL's script cuts after exactly
    10^6 steps; 2186, 1190 and 1000 whole episodes are reported, of 999,906, 999,995 and 1,000,000 steps.
    """
    address = f"{_D4RL}/gym_mujoco_v2/{robot}_medium-v2.hdf5"
    return PublishedData(f"{robot}-medium-v2", "d4rl", address, _CC_BY, size, episodes, 1_000_000, sha256)


def _kitchen(variant: str, file: str, size: int, steps: int, sha256: str) -> PublishedData:
    """D4RL's data of the Franka kitchen, cut from the demonstrations of Gupta et al. 2019.

    Steps, sizes and digests as suk063/reachy-retarget on GitHub found them.
    """
    address = f"{_D4RL}/kitchen/{file}-v0.hdf5"
    return PublishedData(f"kitchen-{variant}-v0", "d4rl", address, _CC_BY, size, None, steps, sha256, timeouts=False)


def _robomimic(task: str, size: int) -> PublishedData:
    """robomimic's multi-human low-dimensional data: six operators with 50 demonstrations each.

    Sizes are those that robomimic's documentation states for the files of version 0.1.
    """
    address = f"{_ROBOMIMIC}/{task}/mh/low_dim_v141.hdf5"
    return PublishedData(task, "robomimic", address, "MIT", size, 300, None)


def _script(robot: str, description: str) -> LocalData:
    """Scripted demonstrations of a robosuite task."""
    return LocalData(
        f"{robot}-local", robot, 200, None, description, script="benchmark.data.manipulation", layout="robomimic"
    )


_D4RL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"  # d4rl 1.1, d4rl/infos.py
_CC_BY = "CC BY 4.0"  # D4RL's README, section Licenses
_ROBOMIMIC = "http://downloads.cs.stanford.edu/downloads/rt_benchmark"  # robomimic 0.3.0, robomimic/__init__.py
_SAC = "a partly trained SAC policy, acting stochastically"

DATASETS: dict[str, LocalData | PublishedData] = {
    data.task: data
    for data in [
        LocalData("hopper-local", "hopper", 1000, "hopper.pt", _SAC),
        # Cloned at the policy's full noise, Walker2d falls early and starts far below the papers.
        LocalData("walker2d-local", "walker2d", 300, "walker2d.pt", _SAC, noise=0.3),
        LocalData("halfcheetah-local", "halfcheetah", 300, "halfcheetah.pt", _SAC),
        LocalData(
            "kitchen-local",
            "kitchen-microwave-kettle-light-slider",
            300,
            None,
            "a scripted demonstrator: microwave, kettle, light switch, slide cabinet",
            script="benchmark.data.kitchen",
        ),
        _script("lift", "a scripted demonstrator with human-like variation"),
        _script("can", "a scripted demonstrator with human-like variation"),
        _script("square", "a scripted demonstrator with human-like variation"),
        LocalData("toy", "toy", 1000, None, "a careless scripted demonstrator"),
        _gym("hopper", 152_756_557, 2187, "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0"),
        _gym("walker2d", 232_254_996, 1191, "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda"),
        _gym("halfcheetah", 237_727_262, 1000, "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0"),
        _kitchen(
            "complete",
            "mini_kitchen_microwave_kettle_light_slider",
            556_544,
            3_680,
            "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81",
        ),
        _kitchen(
            "partial",
            "kitchen_microwave_kettle_light_slider",
            19_558_459,
            136_950,
            "57bfd9c5fe88a7cf702bbaf8b7cd800d30cd869e7f73416007238d26cd859800",
        ),
        _kitchen(
            "mixed",
            "kitchen_microwave_kettle_bottomburner_light",
            19_560_760,
            136_950,
            "a30382a50278fdaea2e2d88e5f2836a95bcf9b581d252617872fd6537302721b",
        ),
        _robomimic("lift", 46_000_000),
        _robomimic("can", 108_000_000),
        _robomimic("square", 119_000_000),
        _robomimic("transport", 609_000_000),
    ]
}


def get_dataset(name: str) -> LocalData | PublishedData:
    """The dataset called `name`.

    Raises:
        ValueError: unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; valid: {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def cache_dir() -> Path:
    """Where generated data and policies are kept: OTPR_BENCH_CACHE, by default ~/.cache/otpr-bench."""
    chosen = os.environ.get("OTPR_BENCH_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "otpr-bench"


def dataset_path(name: str) -> Path:
    """The cached file of a dataset."""
    return cache_dir() / "data" / f"{name}.hdf5"
