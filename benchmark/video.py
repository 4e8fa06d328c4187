"""Films of single episodes, a picture after every environment step, also where there is no display."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmark.envs import VectorEnv
from benchmark.evaluation import Act, environment_actions
from benchmark.policies import Normalizer

Picture = NDArray[np.uint8]  # (height, width, 3)

FORMATS = (".mp4", ".gif")
FRAMES_PER_SECOND = 50  # the most that browsers show of a GIF
_ADVICE = "install libegl1 and libgl1-mesa-dri, or libosmesa6 (Debian's names), or set MUJOCO_GL"


@torch.no_grad()
def film_episode(env: VectorEnv, act: Act, normalizer: Normalizer, seed: int, device: str) -> Iterator[Picture]:
    """Play an episode chunk by chunk, a picture of the start and one after every action.

    Args:
        env: one environment that takes single actions (`action_horizon` 1).
        act: chooses chunks for normalised observations (1, O).
        seed: the reset's.

    Raises:
        ValueError: it cannot be drawn.
        Diverged: an action is not finite.
    """
    index = np.zeros(1, dtype=np.int64)
    observations = env.reset(index, np.array([seed]))
    yield draw(env)
    while True:
        chunk = act(torch.from_numpy(normalizer.normalize_observations(observations)).to(device))
        actions = environment_actions(chunk.actions, normalizer)  # (1, H, A)
        for action in actions[0]:
            step = env.step(index, action[None, None])
            observations = step.observations
            yield draw(env)
            if step.terminated[0] or step.truncated[0]:
                return


def draw(env: VectorEnv) -> Picture:
    """A picture of the first environment.

    Raises:
        ValueError: it cannot be drawn, with what to do about it where graphics are missing.
    """
    try:
        return env.render(0)
    except ValueError as error:
        advice = "" if str(error).endswith("cannot be rendered") else f"; {_ADVICE}"
        raise ValueError(f"{' '.join(str(error).split())}{advice}") from error


def check_format(path: Path) -> None:
    """Raise ValueError unless a film can be written to a file of this name."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a video must end in {' or '.join(FORMATS)}, got {path.name!r}")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"{path.name}: .mp4 needs the package imageio-ffmpeg; without it ask for a .gif")


def write_film(path: Path, pictures: Iterator[Picture]) -> None:
    """Write pictures of one size as they come, to a temporary file that is renamed at the end.

    Raises:
        ValueError: the name does not say a known format, or its encoder is missing.
        OSError: the file cannot be written.
    """
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix.lower()}")
    try:
        (_write_gif if path.suffix.lower() == ".gif" else _write_mp4)(temporary, pictures)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_gif(path: Path, pictures: Iterator[Picture]) -> None:
    first = Image.fromarray(next(pictures))
    rest = (Image.fromarray(picture) for picture in pictures)
    first.save(path, save_all=True, append_images=rest, duration=1000 // FRAMES_PER_SECOND, loop=0)


def _write_mp4(path: Path, pictures: Iterator[Picture]) -> None:
    import imageio_ffmpeg  # pyright: ignore[reportMissingImports]  # optional

    first = next(pictures)
    height, width = first.shape[:2]
    encoder: Any = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2, ffmpeg_log_level="error"
    )
    encoder.send(None)
    try:
        for picture in itertools.chain([first], pictures):
            encoder.send(np.ascontiguousarray(picture))
    finally:
        encoder.close()
