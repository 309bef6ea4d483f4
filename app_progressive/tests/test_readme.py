"""The example in the README works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def test_the_example_prunes_along_a_stream_to_an_exact_density() -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert int(names["weights"]["0.weight"].count_nonzero()) == 432 - int((1 - 0.8**4.5) * 432)
    assert [names["told"][key] for key in ("state", "delta")] == [4, 4.5]
