"""One page and one table of all papers' results: python -m common.house PAGE.html */results/*.json   (or: make report)

The page needs no other file and no network: styles, script and figures are inside.
"""

import base64
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table

from common.claims import figures_of, measured
from common.config import command
from common.runs import CheckpointError, read_json, write_atomically

VERDICTS = ("held", "not held", "inconclusive")


def title(folder: Path) -> str:
    """The paper's title: the first words set in *italics* in the README of its folder, or nothing."""
    readme = folder / "README.md"
    found = re.search(r"\*([^*]+)\*", readme.read_text()) if readme.exists() else None
    return " ".join(found[1].split()) if found else ""


def studies_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Stored results, <paper>/results/<scale>.json, by paper with the demo first, with counts of verdicts and figures.

    Raises:
        UserError: naming a file that is not there or damaged.
    """
    studies = []
    for path in sorted(paths, key=lambda path: (str(path.parent), path.stem != "demo", path.stem)):
        try:
            results = read_json(path)
            counts = Counter(claim["verdict"] for claim in results["claims"])
            pngs = figures_of(path, results["scale"])
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not the results of a study") from error
        images = {name: base64.b64encode(png).decode() for name, png in pngs.items()}
        studies.append({**results, "counts": counts, "images": images, "title": title(path.parents[1])})
    return studies


def write_page(page: Path, studies: Sequence[dict[str, Any]]) -> None:
    """Write `page` of `studies_of` results."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    text = templates.get_template("house.html.j2").render(studies=studies, verdicts=VERDICTS, measured=measured)
    write_atomically(page, text.encode())


def print_summary(studies: Sequence[dict[str, Any]]) -> None:
    """Verdicts and minutes of each study and of all, in the terminal."""
    table = Table("paper", "scale", *VERDICTS, "minutes", "date")
    for study in studies:
        counts = [str(study["counts"][verdict]) for verdict in VERDICTS]
        table.add_row(study["paper"], study["scale"], *counts, f"{study['seconds'] / 60:.1f}", study["date"][:10])
    totals = [str(sum(study["counts"][verdict] for study in studies)) for verdict in VERDICTS]
    minutes = sum(study["seconds"] for study in studies) / 60
    table.add_section()
    table.add_row("all", "", *totals, f"{minutes:.1f}", "")
    Console(width=None if Console().is_terminal else 110).print(table)


def main() -> int:
    """Write the page named first from the results named after it, and print their summary."""
    page, *results = map(Path, sys.argv[1:])
    studies = studies_of(results)
    write_page(page, studies)
    print_summary(studies)
    print(f"all claims, figures and numbers: {page}")
    return 0


if __name__ == "__main__":
    command(main)
