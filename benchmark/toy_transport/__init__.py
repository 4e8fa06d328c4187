"""Neural transport held against exact answers, and pictures of what it does: the suite `toy-transport`.

    python -m benchmark.run --suite toy-transport

Under DIR/report: transport.csv (columns and definitions in `solve`), transport.md, which says what they mean, and the
figures toy_transport and plan_matrix (PNG and PDF).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmark.report.style import save
from benchmark.store import write_rows, write_text
from benchmark.toy_transport.figures import matrix_figure, plane_figure, plane_panels
from benchmark.toy_transport.solve import COLUMNS, SETTINGS, Row, missed, plane_cases, smooth_cases, solve_case
from benchmark.toy_transport.text import describe
from otpr.potentials import TransportSettings


@dataclass(frozen=True)
class Sizes:
    """How large the suite is; tests make it small."""

    settings: TransportSettings = SETTINGS
    diffusion_steps: int = 2500


def run(out: Path, progress: Callable[[str], None], sizes: Sizes | None = None) -> bool:
    """Write everything below `out`/report; `progress` gets a line now and then.

    Returns:
        Whether all required figures were reached.

    Raises:
        OSError: the directory cannot be written.
        RuntimeError: the exact solver failed on one of the problems.
    """
    sizes, report = sizes or Sizes(), out / "report"
    rows: list[Row] = []
    cases = smooth_cases(sizes.settings)
    for done, case in enumerate(cases, 1):
        solved = solve_case(case)
        rows += solved.rows
        progress(f"potentials {done} of {len(cases)}: {summary(solved.rows[0])}")
        write_rows(report / "transport.csv", rows, COLUMNS)
    panels = []
    for case in plane_cases(sizes.settings):
        solved = solve_case(case)
        rows += solved.rows
        panels.append(plane_panels(case, solved, sizes.diffusion_steps))
        progress(f"{case.problem.name}: {summary(solved.rows[0])}")
    write_rows(report / "transport.csv", rows, COLUMNS)
    write_text(report / "transport.md", describe(rows))
    save(plane_figure(list(zip(panels[::2], panels[1::2], strict=True))), report, "toy_transport")
    save(matrix_figure(sizes.settings), report, "plan_matrix")
    failures = len(missed(rows))
    progress(f"report: {report}" + (f"; {failures} required figures MISSED, see transport.md" if failures else ""))
    return not failures


def summary(row: Row) -> str:
    """The figures of a row in a few words."""
    gap, error = float(row["relative_gap"]), float(row["marginal_error"])
    return f"{row['regulariser']} eps {row['epsilon']}, {row['solver']}, gap {gap:.2%}, marginal error {error:.1%}"
