"""The page that explains `transport.csv`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.tables import markdown_table
from benchmark.toy_transport.problems import KEYPOINTS
from benchmark.toy_transport.solve import LARGEST_ERROR, LARGEST_GAP, PLANE_EPSILON, Row, missed

_PAGE = """# Transport against exact answers

Potentials u(s), v(a) (networks) are fitted to a block of states and chunks drawn independently; the same block is
solved exactly with POT. `smooth`: a random trigonometric cost over states and chunks; its scale and offset are
multiplied and added before the fit sees it. Masked `smooth` rows match {keypoints} keypoint pairs and give half of the
cost to their guide. All values are in units of the standardised cost.

- `relative_gap`: |dual - exact| / |exact - independent|, with `independent` the value of the plan that is constant
  wherever the mask permits: mean(c) + eps for L2, mean(c) for entropic, without mask. With a mask the keypoints' own
  share, the same in every plan, is on both sides and drops out of the denominator.
- `marginal_error`: the larger of mean |E_a[H] - 1| and mean |E_s[H] - 1|.
- `points`: fitted, the block of the fit; fresh, the same potentials on a new block.
- `seconds`: of the fit; of evaluating the potentials (fresh rows); of POT (exact rows).
- `required`: gap at most {gap:.0%} and marginal error at most {error:.0%}.

## Required

{required}

## Limits

Nothing is required here: these rows show where networks of this size stop.

{limits}

{entropic}

On fresh points the marginals are wrong by far more than on fitted ones: a network fitted to one block does not know the
next. Judge a fit by the points that it is used on.

## Figures

![Maps of the plane](toy_transport.png)

A Gaussian moved to eight Gaussians and to a Swiss roll (L2, eps {epsilon}), by the squared distance and by eight pairs.
With pairs the cost is their guide alone (shares 0 and 1) under the mask, as in OTCS's semi-paired case. The colour of a
point is the angle of its source. Barycentric: E[y H] / E[H]. Diffusion: samples of a small conditional model trained on
independent pairs, resampled in proportion to H.

![A cost matrix and its plan](plan_matrix.png)

Q of a small block, its plan by networks fitted to that block, and the exact plan; the order of states and of chunks is
the same in all three.
"""


def describe(rows: Sequence[Row]) -> str:
    """transport.md of the rows of transport.csv."""
    neural = [row for row in rows if row["solver"] == "neural"]
    required = [row for row in neural if row["required"] == "yes"]
    return _PAGE.format(
        keypoints=KEYPOINTS,
        gap=LARGEST_GAP,
        error=LARGEST_ERROR,
        epsilon=PLANE_EPSILON,
        required=_required(required),
        limits=_limits([row for row in neural if row["required"] == "no"]),
        entropic=_entropic([row for row in neural if row["regulariser"] == "entropic"]),
    )


def _required(rows: Sequence[Row]) -> str:
    """The worst of the required rows in a sentence."""
    gap, error, seconds = (
        max(float(row[name]) for row in rows) for name in ("relative_gap", "marginal_error", "seconds")
    )
    failures = len(missed(rows))
    verdict = f"**{failures} of {len(rows)} rows miss them.**" if failures else f"All {len(rows)} rows hold."
    return f"{verdict} Worst gap {gap:.2%}, worst marginal error {error:.2%}, longest fit {seconds:.1f} s."


def _limits(rows: Sequence[Row]) -> str:
    """A table of rows."""
    header = ["problem", "regulariser", "masked", "points", "eps", "gap", "marginal error"]
    cells = [
        [row["problem"], row["regulariser"], row["masked"], row["points"], row["epsilon"]]
        + [f"{float(row[name]):.2%}" for name in ("relative_gap", "marginal_error")]
        for row in rows
    ]
    return markdown_table(header, cells, left=4)


def _entropic(rows: Sequence[Row]) -> str:
    """Down to which epsilon networks meet the requirements for the entropic problem."""
    good = [
        float(row["epsilon"])
        for row in rows
        if float(row["relative_gap"]) <= LARGEST_GAP and float(row["marginal_error"]) <= LARGEST_ERROR
    ]
    tried = ", ".join(row["epsilon"] for row in rows)
    where = f"down to eps {min(good):g}" if good else "at none of them"
    return f"Entropic, eps {tried}: networks meet the required figures {where}."
