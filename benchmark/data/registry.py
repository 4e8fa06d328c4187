"""What datasets there are, what decides their contents, and where they lie."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark.seeding import BASE_SEED
from benchmark.store import read_json

GENERATOR_VERSION = 1  # raise it whenever the same recipe would give other numbers
DEMONSTRATORS = Path(__file__).parent / "demonstrators"


@dataclass(frozen=True)
class LocalData:
    """A dataset generated on this machine.

    Attributes:
        task: the task that it is for, and its own name.
        environment: name known to `benchmark.envs.make_env`.
        episodes: whole episodes in it.
        demonstrator: file of the policy that is rolled out, below `DEMONSTRATORS`; None for a scripted demonstrator.
        seed: base seed of resets and actions.
    """

    task: str
    environment: str
    episodes: int
    demonstrator: str | None
    description: str
    seed: int = BASE_SEED

    def recipe(self) -> dict[str, str | int]:
        """Everything that decides the contents.

        Raises:
            ValueError: the demonstrator or its card is missing, or they do not belong together.
        """
        values = {key: value for key, value in asdict(self).items() if key not in ("description", "demonstrator")}
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
            return "scripted"
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{path}: no demonstrator ({error.strerror})") from error
        if read_json(path.with_suffix(".json")).get("sha256") != digest:
            raise ValueError(f"{path}: not the file that its card describes (SHA-256 {digest[:12]}...)")
        return digest


DATASETS: dict[str, LocalData] = {
    data.task: data
    for data in [
        LocalData("hopper-local", "hopper", 1000, "hopper.pt", "a partly trained SAC policy, acting stochastically"),
        LocalData("toy", "toy", 1000, None, "a careless scripted demonstrator"),
    ]
}


def get_dataset(name: str) -> LocalData:
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
