"""Figures of the study: rates and score over density, masks by label, and what each scan found."""

from collections.abc import Mapping
from statistics import mean

from matplotlib.figure import Figure

from backdoor_lth.measures import seeds_of
from backdoor_lth.metrics import implanted
from common.claims import Rows

RATES = {"sa": "SA", "asr": "ASR", "ctr": "CTR", "tuned_asr": "ASR, fine-tuned"}
NETWORKS = ("dense", "winner", "H", "L")


def draw(rows: Rows) -> dict[str, Figure]:
    """Those figures for which there are rows."""
    arms = list(dict.fromkeys(row["cell"]["arm"] for row in rows))
    figures = {}
    if any(row["cell"]["what"] == "ticket" for row in rows):
        figures["rates"] = _rates(rows, arms)
    if any(row["cell"]["what"] == "scan" for row in rows):
        figures["masks"] = _masks(rows, arms)
    return figures


def summary(rows: Rows, kinds: Mapping[str, str]) -> list[str]:
    """One line for each arm and network: how often the target was named, and means over seeds, controls beside.

    `kinds` are the attacks of the arms: where one is not implanted, a line says at which seeds.
    """
    lines = []
    for arm in dict.fromkeys(row["cell"]["arm"] for row in rows):
        dense = [row for row in rows if (row["cell"]["arm"], row["cell"]["what"]) == (arm, "dense")]
        if missed := [str(row["seed"]) for row in dense if not implanted(row["metrics"], kinds[arm])]:
            lines.append(
                f"{arm}: attack not implanted at seeds {', '.join(missed)} (ASR below 90 % on the dense network)"
            )
        for network in (*NETWORKS, "winner-clean"):
            found = _scans(rows, arm, network)
            if not found:
                continue
            names = ("sa", "asr", "ctr", "own_asr", "dense_asr", "dense_null")
            means = ", ".join(f"{name} {mean(each[name] for each in found):.1f}" for name in names)
            right, same, driven = (
                sum(each[k] for each in found) for k in ("right", "collapse_right", "trigger_driven")
            )
            lines.append(
                f"{arm}, {network}: target named in {right} of {len(found)} (by the answer to noise in {same}), "
                f"trigger-driven in {driven}; means {means} %"
            )
    return lines


def _scans(rows: Rows, arm: str, network: str) -> list[dict]:  # type: ignore[type-arg]
    cells = ({**row["cell"], "metrics": row["metrics"]} for row in rows)
    return [each["metrics"] for each in cells if (each["arm"], each.get("network")) == (arm, network)]


def _rates(rows: Rows, arms: list[str]) -> Figure:
    figure = Figure(figsize=(4 * len(arms), 6), layout="constrained")
    panels = figure.subplots(2, len(arms), sharex=True, sharey="row", squeeze=False)
    for column, arm in enumerate(arms):
        for index, (name, label) in enumerate((*RATES.items(), ("score", "Trojan score"))):
            panel = panels[int(name == "score"), column]
            for seed in seeds_of(rows, arm):
                own = [
                    row["metrics"]
                    for row in rows
                    if (row["cell"]["arm"], row["cell"]["what"], row["seed"]) == (arm, "ticket", seed)
                ]
                first = seed == seeds_of(rows, arm)[0]
                panel.plot(
                    [100 * each["density"] for each in own],
                    [each[name] for each in own],
                    color=f"C{index}",
                    alpha=0.6,
                    linewidth=1,
                    label=label if first else None,
                )
        panels[0, column].set(title=arm, ylabel="%" if not column else None)
        panels[1, column].set(xscale="log", xlabel="density, %", ylabel="Trojan score" if not column else None)
    panels[0, 0].invert_xaxis()  # all share it
    panels[0, 0].legend(fontsize=7)
    return figure


def _masks(rows: Rows, arms: list[str]) -> Figure:
    figure = Figure(figsize=(3 * len(NETWORKS), 2.2 * len(arms)), layout="constrained")
    panels = figure.subplots(len(arms), len(NETWORKS), squeeze=False)
    for line, arm in enumerate(arms):
        for column, network in enumerate(NETWORKS):
            panel = panels[line, column]
            scans = _scans(rows, arm, network)
            panel.set_visible(bool(scans))
            for number, found in enumerate(scans):
                panel.plot(range(len(found["l1"])), found["l1"], "o", markersize=3, color=f"C{number}")
                panel.plot([found["detected"]], [min(found["l1"])], "v", markersize=8, color=f"C{number}")
            panel.set_title(f"{arm}, {network}", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("label")
    for panel in panels[:, 0]:
        panel.set_ylabel("size of the mask")
    return figure
