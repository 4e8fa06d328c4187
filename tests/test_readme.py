"""Every command of the README is one that works; every file that it links to is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.methods import ARMS
from benchmark.suites import suite_names
from benchmark.tasks import TASKS

ROOT = Path(__file__).parents[1]
DOCUMENTED = ("otpr", "baselines", "benchmark", "results")  # folders with documents
TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (-m .*)$", "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)), re.MULTILINE)
# What takes minutes, or needs a file or the network, is asked for something more, or finds nothing, so that it ends
# once all its options have been understood, and says this.
ENDS = {
    "-m benchmark.speed": (["--json", "."], "error: . is a directory"),
    "-m benchmark.pretrain": (["--data", "missing"], "error: missing: "),
    "-m benchmark.diagnose": ([], "missing/spec.json"),
    "-m benchmark.evaluate --run": ([], "missing/spec.json"),
    "-m benchmark.data get": (["nothing"], "cannot download 'nothing' (unknown)"),
    "-m benchmark.data import": ([], "hopper_medium-v2.hdf5"),
    "-m benchmark.data import-policy": ([], "state_5000.pt"),
    "-m benchmark.report --out": ([], "missing is not a directory"),
}
EXTRAS = {"--video": "imageio_ffmpeg", "--export": "pyarrow"}  # of which the first to be missing is named
SLURM = [command for command in COMMANDS if "--launcher slurm" in command]  # run by test_slurm.py


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in SLURM])
def test_readme_command_works(command: str, tmp_path: Path, cache: Path) -> None:
    arguments = shlex.split(command)
    more, words = ENDS.get(" ".join(arguments[:3]), ENDS.get(" ".join(arguments[:2]), ([], "")))
    if arguments[1] == "benchmark.run":
        more = ["--dry-run"]
    if "--published" in arguments:  # there is something to report without any run
        words = ""
    elif "--import" in arguments:
        words = "curves.csv"
    for option, package in EXTRAS.items():
        if option in arguments and importlib.util.find_spec(package) is None:
            words = f"needs {'the package ' if option == '--video' else ''}{package.replace('_', '-')}"
    if "--run" in arguments:
        arguments[3] = "missing"
    elif "--out" in arguments and arguments[1] != "benchmark.status":
        out = "missing" if words else "out"
        arguments[arguments.index("--out") + 1] = str(tmp_path / out)
    mine = shutil.copy(ROOT / "benchmark" / "suites" / "quick.toml", tmp_path / "mine.toml")
    arguments = [str(mine) if argument == "mine.toml" else argument for argument in arguments]
    environment = {"OTPR_BENCH_CACHE": str(cache / "readme"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *arguments, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert words in done.stderr and len(done.stderr.splitlines()) <= 1, done.stderr
    assert done.returncode == 0 or words, done.stderr


def test_links_of_every_document_lead_somewhere() -> None:
    documents = [path for folder in DOCUMENTED for path in (ROOT / folder).rglob("*.md")] + [ROOT / "README.md"]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#\s]+)\)", path.read_text())]
    assert len(documents) >= 10 and len(links) >= 30
    lost = [(path, link) for path, link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not lost


def test_readme_names_what_there_is() -> None:
    words = set(re.findall(r"`([^`\s]+)`", TEXT))
    assert {*suite_names(), *TASKS, *ARMS} <= words
    assert len(COMMANDS) >= 12
