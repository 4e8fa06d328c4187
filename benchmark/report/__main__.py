"""Write tables and plots from whatever runs are in a results directory: `python -m benchmark.report --out DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmark.command_line import refuse_repeated
from benchmark.report.writer import NoEvaluationError, Options, write_report
from benchmark.tables import printable


@dataclass(frozen=True)
class Arguments:
    """Write tables, plots and a page from whatever runs are in a results directory, into DIR/report.

    Exit status: 0 the report is written; 1 no run has an evaluation yet; 2 bad input, nothing written.

    Example: python -m benchmark.report --out results/quick

    Example, beside the published curves: python -m benchmark.report --out results/hopper-check --published

    Example, of anybody's curves: python -m benchmark.report --out mine --import curves.csv --export openrlbenchmark
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Results directory, with runs in DIR/TASK/METHOD/seed-K; may be empty where curves come from elsewhere."""
    imports: Annotated[tuple[Path, ...], tyro.conf.arg(name="import", metavar="CSV [CSV ...]")] = ()
    """Curves from elsewhere: columns task, method, seed, env_steps, score; others are ignored."""
    published: bool = False
    """Draw published curves behind, dashed, with a table of them; without any run, report them alone."""
    export: tuple[Literal["parquet", "tensorboard", "wandb", "openrlbenchmark"], ...] = ()
    """Further formats, into DIR/report; all but openrlbenchmark (CSV) need the extra `export`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's); returns the exit status."""
    refuse_repeated(sys.argv[1:] if arguments is None else arguments, ("--import", "--export"))
    options = tyro.cli(Arguments, prog="python -m benchmark.report", args=arguments)
    try:
        report = write_report(options.out, Options(options.imports, options.published, options.export))
    except (ValueError, OSError) as error:
        print(f"benchmark.report: {printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, NoEvaluationError) else 2
    print(f"report: {printable(str(report / 'index.html'))} and {printable(str(report / 'summary.md'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
