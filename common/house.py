"""One page of all papers' results: python -m common.house PAGE.html */results/*.json   (or: make report)

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

from common.claims import figures_of, measured
from common.config import command
from common.runs import read_json, write_atomically


def title(folder: Path) -> str:
    """The paper's title: the first words set in *italics* in the README of its folder, or nothing."""
    readme = folder / "README.md"
    found = re.search(r"\*([^*]+)\*", readme.read_text()) if readme.exists() else None
    return " ".join(found[1].split()) if found else ""


def write_page(page: Path, paths: Sequence[Path]) -> None:
    """Write `page` from stored results, <paper>/results/<scale>.json, with their figures.

    Raises:
        UserError: naming a file that is not there or damaged; nothing is written then.
    """
    studies: list[dict[str, Any]] = []
    for path in sorted(paths, key=lambda path: (str(path.parent), path.stem != "demo", path.stem)):
        results = read_json(path)
        counts = Counter(claim["verdict"] for claim in results["claims"])
        images = {name: base64.b64encode(png).decode() for name, png in figures_of(path, results["scale"]).items()}
        studies.append({**results, "counts": counts, "images": images, "title": title(path.parents[1])})
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    verdicts = ("held", "not held", "inconclusive")
    text = templates.get_template("house.html.j2").render(studies=studies, verdicts=verdicts, measured=measured)
    write_atomically(page, text.encode())


def main() -> int:
    """Write the page named first from the results named after it."""
    page, *results = map(Path, sys.argv[1:])
    write_page(page, results)
    print(page)
    return 0


if __name__ == "__main__":
    command(main)
