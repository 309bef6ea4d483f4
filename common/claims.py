"""A paper's claims as data, three-valued verdicts from what was measured, and the report.

A verdict is `held` or `not held` only where the one-sided 95 % bound lies on that side of the threshold, which was
fixed beforehand; all between, and all that was measured on one seed, is `inconclusive`.
"""

import base64
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from common.config import command
from common.runs import environment, read_json, write_atomically, write_json
from common.study import StudyResult

Rows = Sequence[Mapping[str, Any]]
Metrics = Mapping[str, Any]
Number = Callable[[Metrics], float]
Measure = Callable[[Rows], list[float]]
Arm = str | Mapping[str, Any]
Draw = Callable[[Rows], Mapping[str, Figure]]
Verdict = Literal["held", "not held", "inconclusive"]
Judging = Callable[[Sequence["Claim"], Rows], list[dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper and how it is judged.

    Args:
        id: as in the paper's README.
        statement: one sentence.
        source: where the paper says it.
        paper: the paper's number with its setting; ours never stands beside it without.
        measure: rows -> one number a seed (paired differences, ratios, 0/1); KeyError or nothing where rows lack it.
        threshold: of the estimate, fixed before the measured run; for "equivalent" the margin on both sides of 0.
        direction: the side of the threshold on which the claim holds.
        interval: "t" paired one-sided t bounds of the mean, none where all values are equal; "sign" exact sign-test
            bounds of the median (decides from five seeds on); "binomial" exact (Clopper-Pearson) bounds of the share of
            ones; "bootstrap" percentile bounds of the mean (from twenty on: of few values they are too narrow); "worst"
            the worst seed: a statement about the seeds measured, without a bound.
        at_least: with "above", the estimate must also reach this.
        unit: of the measure.
    """

    id: str
    statement: str
    source: str
    paper: str
    measure: Callable[[Rows], Sequence[float]]
    threshold: float = 0.0
    direction: Literal["above", "below", "equivalent"] = "above"
    interval: Literal["t", "sign", "binomial", "bootstrap", "worst"] = "t"
    at_least: float = -math.inf
    unit: str = "points"

    @property
    def rule(self) -> str:
        """The test in words."""
        sign = {"above": "> ", "below": "< ", "equivalent": "within ±"}[self.direction]
        least = f", estimate ≥ {self.at_least:g}" if self.at_least > -math.inf else ""
        return f"{sign}{self.threshold:g} ({self.interval}{'' if self.interval == 'worst' else ', 95 %'}){least}"


def bounds(values: Sequence[float], interval: str, direction: str = "above") -> tuple[float, float, float]:
    """Estimate of `values` (n >= 1), lower and upper one-sided 95 % bounds, infinite where n is too small."""
    x = np.asarray(values, float)
    estimate = float(np.median(x) if interval == "sign" else x.mean())
    low, high = -math.inf, math.inf
    if len(x) < {"sign": 5, "bootstrap": 20}.get(interval, 2):  # too few for such bounds
        return estimate, low, high
    if interval == "worst":
        low, high = float(x.min()), float(x.max())
        low, high = {"above": (low, low), "below": (high, high), "equivalent": (low, high)}[direction]
    elif interval == "sign":
        low, high = stats.quantile_test(x, p=0.5).confidence_interval(0.9)
    elif interval == "binomial":
        low, high = stats.binomtest(round(x.sum()), len(x)).proportion_ci(0.9, method="exact")
    elif np.ptp(x) <= 1e-9 * max(np.abs(x).max(), 1e-3):  # equal values say nothing of their spread
        return estimate, low, high
    elif interval == "bootstrap":
        low, high = stats.bootstrap((x,), np.mean, confidence_level=0.9, method="percentile", rng=0).confidence_interval
    else:
        low, high = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    return estimate, float(low), float(high)


def verdict(claim: Claim, values: Sequence[float]) -> Verdict:
    """The verdict of `claim` on its measured `values` (one a seed; none at all is inconclusive)."""
    if not len(values):
        return "inconclusive"
    estimate, low, high = bounds(values, claim.interval, claim.direction)
    edge = claim.threshold
    if claim.direction == "equivalent":
        holds, fails = -edge < low and high < edge, low > edge or high < -edge
    elif claim.direction == "below":
        holds, fails = high < edge, low >= edge
    else:
        holds, fails = low > edge and estimate >= claim.at_least, high <= edge or high < claim.at_least
    return "held" if holds else "not held" if fails else "inconclusive"


def by_seed(rows: Rows, arm: Arm) -> dict[int, Metrics]:
    """Metrics by seed of the rows of an arm: its name, or what its cells hold. Raises KeyError where there is none."""
    wanted = {"arm": arm} if isinstance(arm, str) else arm
    found = {
        row["seed"]: row["metrics"]
        for row in rows
        if all(key in row["cell"] and row["cell"][key] == value for key, value in wanted.items())
    }
    if not found:
        raise KeyError(f"no rows of {arm}")
    return found


def each(arm: Arm, number: Number) -> Measure:
    """A measure: per seed, a number of one arm."""
    return lambda rows: [number(metrics) for metrics in by_seed(rows, arm).values()]


def difference(arm: Arm, reference: Arm, number: Number) -> Measure:
    """A measure: per seed that has both, a number of `arm` minus that of `reference`."""

    def measure(rows: Rows) -> list[float]:
        ours, theirs = by_seed(rows, arm), by_seed(rows, reference)
        return [number(ours[seed]) - number(theirs[seed]) for seed in ours if seed in theirs]

    return measure


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the r-th smallest of m times m - r + 1, at most 1, never below the one before it."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = least
    return {name: adjusted[name] for name in p}


def judge(claims: Sequence[Claim], rows: Rows) -> list[dict[str, Any]]:
    """Each claim with values, estimate, bounds and verdict as plain data; without its rows it is inconclusive."""
    judged = []
    for claim in claims:
        try:
            values = [float(value) for value in claim.measure(rows)]
        except KeyError:
            values = []
        if not all(map(math.isfinite, values)):
            values = []
        numbers = bounds(values, claim.interval, claim.direction) if values else (math.nan,) * 3
        finite = [number if math.isfinite(number) else None for number in numbers]
        words = {key: getattr(claim, key) for key in ("id", "statement", "source", "paper", "unit", "rule")}
        estimates = dict(zip(("estimate", "low", "high"), finite, strict=True))
        judged.append({**words, "values": values, **estimates, "verdict": verdict(claim, values)})
    return judged


def measured(claim: Mapping[str, Any]) -> str:
    """Our number of a judged claim: estimate [bounds] unit, n."""
    if claim["estimate"] is None:
        return "not measured"
    low, high = ("∞" if claim[key] is None else _short(claim[key]) for key in ("low", "high"))
    count = f"{claim['unit']}, n={len(claim['values'])}"
    if "(worst)" in claim["rule"] and claim["low"] is not None:
        worst = low if low == high else f"{low} to {high}"
        return f"{_short(claim['estimate'])}, worst {worst} {count}"
    return f"{_short(claim['estimate'])} [{low}, {high}] {count}".replace("[∞", "[-∞")


def _short(number: float) -> str:
    return f"{number:.2f}" if abs(number) < 1e-12 or abs(number) >= 0.1 else f"{number:.2g}"


def print_table(results: Mapping[str, Any]) -> None:
    """The claims table in the terminal."""
    columns = ("claim", "statement", "paper (its setting)", "ours [one-sided 95 % bounds]", "verdict")
    table = Table(*map(escape, columns), title=f"{results['paper']}, {results['scale']} scale", show_lines=True)
    colours = {"held": "green", "not held": "red", "inconclusive": "yellow"}
    for claim in results["claims"]:
        coloured = f"[{colours[claim['verdict']]}]{claim['verdict']}[/]"
        words = (claim["id"], claim["statement"], claim["paper"], f"{measured(claim)}\n{claim['rule']}")
        table.add_row(*map(escape, words), coloured)
    Console(width=None if Console().is_terminal else 140).print(table)


def write_report(results: Mapping[str, Any], figures: Mapping[str, bytes], folder: Path) -> Path:
    """Write <scale>.json, <scale>.md with figures <scale>-<name>.png, and <scale>.html, which needs no other file.

    `results` has paper, scale, machine, versions, revision, date, seconds, rows, failed (cells) and judged claims;
    `figures` are PNGs by name. Returns the HTML file's path.
    """
    scale = results["scale"]
    for old in set(figures_of(folder / f"{scale}.json", scale)) - set(figures):
        (folder / f"{scale}-{old}.png").unlink()
    for name, picture in figures.items():
        write_atomically(folder / f"{scale}-{name}.png", picture)
    write_json(folder / f"{scale}.json", results)
    images = {name: base64.b64encode(picture).decode() for name, picture in sorted(figures.items())}
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    for kind in ("md", "html"):
        text = templates.get_template(f"report.{kind}.j2").render(results=results, images=images, measured=measured)
        write_atomically(folder / f"{scale}.{kind}", text.encode())
    return folder / f"{scale}.html"


def report(
    paper: str, study: StudyResult, claims: Sequence[Claim], draw: Draw, folder: Path, judging: Judging = judge
) -> int:
    """Judge the study, write its report to `folder`, print its table and its failed cells; returns the exit status.

    Without any row nothing is written: earlier results stay.
    """
    figures = {}
    for name, figure in draw(study.rows).items() if study.rows else ():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        figures[name] = buffer.getvalue()
    facts = {key: value for key, value in environment().items() if key != "threads"}
    facts["revision"] = ", ".join(study.revisions)
    counts = {"scale": study.scale, "seconds": round(study.seconds, 1), "rows": study.rows}
    counts["failed"] = sorted(study.failed)
    results = {"paper": paper, **facts, **counts, "claims": judging(claims, study.rows)}
    if study.rows:
        path = write_report(results, figures, folder)
        print_table(results)
        print(f"{len(study.rows)} rows in {study.seconds / 60:.1f} minutes; the report: {path}")
    else:
        print(f"no rows, so {folder} is left as it is")
    for name, log in study.failed.items():
        lines = log.read_text().strip().splitlines() if log.exists() else []
        print(f"failed: {name}: {lines[-1] if lines else 'died without a word'} (log: {log})")
    return 1 if study.failed else 0


def figures_of(path: Path, scale: str) -> dict[str, bytes]:
    """The PNGs beside stored results by name."""
    prefix = f"{scale}-"
    return {file.stem.removeprefix(prefix): file.read_bytes() for file in sorted(path.parent.glob(f"{prefix}*.png"))}


def main() -> int:
    """`python -m common.claims RESULTS.json ...`: write the reports of stored results again."""
    for path in map(Path, sys.argv[1:]):
        results = read_json(path)
        print(write_report(results, figures_of(path, results["scale"]), path.parent))
    return 0


if __name__ == "__main__":
    command(main)
