"""What a run's provenance says of the checkout that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmark.provenance import git_state


def test_only_code_that_differs_from_the_commit_is_a_change(tmp_path: Path) -> None:
    code, report = tmp_path / "benchmark" / "run.py", tmp_path / "results" / "quick" / "report" / "summary.md"
    for file in (code, report):
        file.parent.mkdir(parents=True)
        file.write_text("committed")
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "all")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = git_state(code.parent)
    assert len(clean["commit"] or "") == 40 and clean["dirty"] is None

    report.write_text("written again when a task was done")
    assert git_state(code.parent) == clean
    code.write_text("edited")
    dirty = git_state(code.parent)
    assert dirty["commit"] == clean["commit"] and len(dirty["dirty"] or "") == 64
    code.write_text("edited otherwise")
    edited = git_state(code.parent)["dirty"]
    assert edited != dirty["dirty"]

    code.write_text("committed")
    method = code.parent / "methods" / "mine.py"
    method.parent.mkdir()
    found = [edited]
    for text in ("a method that was not added yet", "another"):
        method.write_text(text)
        found.append(git_state(code.parent)["dirty"])
    assert None not in found and len(set(found)) == 3
    method.rename(tmp_path / "notes.py")
    editor = code.parent / ".#run.py"
    editor.symlink_to("somebody@somewhere")
    assert git_state(code.parent)["dirty"]
    editor.unlink()
    assert git_state(code.parent) == clean


def test_a_checkout_around_an_environment_is_somebody_elses(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    installed = tmp_path / ".venv" / "site-packages" / "benchmark"
    installed.mkdir(parents=True)
    assert git_state(installed) == {"commit": None, "dirty": None}


def test_outside_a_checkout_nothing_is_known(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
