"""Facts about shipping a rule as a preset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import ConfigError, UserError
from symbolic_l2o import SymbolicRule, presets
from symbolic_l2o.export import ExportConfig, export

RP = presets("rp_pole_mnist5k")


def study(folder: Path, **gains: float) -> Path:
    """Results with one pole rule for each arm, RP's made smaller."""
    rows = []
    for arm, gain in gains.items():
        values = {name: gain * value for name, value in RP.coefficients.items() if name[:2] in ("w_", "a_")}
        rule = RP.with_coefficients(values)
        metrics = {"r2": 0.5, "rule": rule.to_json()}
        rows.append({"cell": {"arm": arm, "what": "equation", "by": "pole"}, "seed": 3, "metrics": metrics})
    rows.append({"cell": {"arm": "rp", "what": "teacher"}, "seed": 3, "metrics": {"loss": 1.0}})
    path = folder / "smoke.json"
    path.write_text(json.dumps({"scale": "smoke", "date": "2026-01-02 03:04", "revision": "abc", "rows": rows}))
    return path


def options(place: Path, folder: Path, **changes: object) -> ExportConfig:
    return ExportConfig(**{"source": str(place), "name": "mine", "folder": str(folder), "problems": ["tanh"]} | changes)  # type: ignore[arg-type]


def test_the_rule_that_learns_best_is_shipped_with_its_provenance(tmp_path: Path) -> None:
    lines: list[str] = []
    source = study(tmp_path, rp=0.001, rp_s=1.0, rp_si=0.003, dm=1.0)
    path = export(options(source, tmp_path / "to"), lines.append)
    rule = SymbolicRule.from_json(path.read_text())
    assert rule.coefficients == RP.coefficients and path == tmp_path / "to" / "mine.json"
    for words in ("pole form of a rp_s teacher", "revision abc", "seed 3", "meta-steps", "best of 3", "seed 20"):
        assert words in rule.provenance
    assert len(lines) == 3 and not any("dm teacher" in line for line in lines)


def test_one_rule_is_shipped_without_a_race(tmp_path: Path) -> None:
    path = export(options(study(tmp_path, rp=0.5), tmp_path))
    assert "best of" not in SymbolicRule.from_json(path.read_text()).provenance


def test_a_preset_is_written_over_only_where_that_is_asked_for(tmp_path: Path) -> None:
    source = study(tmp_path, rp=0.5)
    path = export(options(source, tmp_path / "to"))
    path.write_text("an earlier preset")
    with pytest.raises(ConfigError, match="name must be another than that of a preset, or overwrite, got 'mine'"):
        export(options(source, tmp_path / "to"))
    assert path.read_text() == "an earlier preset"
    export(options(source, tmp_path / "to", overwrite=True))
    assert "rp teacher" in SymbolicRule.from_json(path.read_text()).provenance


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "name must be a lower-case word"),
        ({"name": "../x"}, "name must be a lower-case word"),
        ({"seed": 3}, "seed must be at least 10, got 3"),
        ({"starts": 0}, "starts must be at least 1"),
        ({"problems": []}, "problems must be at least one problem"),
        ({"form": "operon-7"}, "form must be one that"),
        ({"source": "nowhere.json"}, "source must be a study's results or a run's folder, got 'nowhere.json'"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export(options(study(tmp_path, rp=0.5), tmp_path, **changes))


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("[]", "{}", '{"scale": "../../x", "date": "", "revision": "", "rows": []}', "not json"):
        path.write_text(text)
        with pytest.raises(UserError):
            export(options(path, tmp_path))
