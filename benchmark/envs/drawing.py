"""Drawing with MuJoCo, also where there is no display."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import mujoco

_PROBE = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16)"
_READERS = ("mujoco.rendering.classic.gl_context", "mujoco.gl_context")  # read MUJOCO_GL once, when imported
_failures: list[str] = []  # why this process could not draw


def make_renderer(model: Any, width: int, height: int) -> mujoco.Renderer:
    """A renderer of an `mujoco.MjModel`, by what `choose_graphics` finds.

    Where one could not be made none is tried again: MuJoCo would end the process.

    Raises:
        ValueError: this machine cannot draw, or not a picture of that size; the former is one line.
    """
    if not _failures:
        try:
            choose_graphics()
            return mujoco.Renderer(model, height, width)
        except ValueError:  # the size
            raise
        except Exception as error:  # a missing OpenGL shows as any of half a dozen types
            _failures.append(" ".join(str(error).split()) or type(error).__name__)
    raise ValueError(_failures[0])


def choose_graphics() -> None:
    """Let MuJoCo draw on a Linux machine without a display: set MUJOCO_GL to what works here, EGL or else OSMesa.

    MUJOCO_GL stays where it is set, and nothing is set where there is a display, or where neither works.
    """
    chosen = any(os.environ.get(name) for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"))
    if not chosen and sys.platform.startswith("linux"):
        for name in ("egl", "osmesa"):
            environment = os.environ | {"MUJOCO_GL": name}
            done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, check=False)
            if not done.returncode:
                os.environ["MUJOCO_GL"] = name
                break
    for module in _READERS:  # which were imported before it was set, here or by robosuite
        if os.environ.get("MUJOCO_GL") and module in sys.modules:
            importlib.reload(sys.modules[module])
