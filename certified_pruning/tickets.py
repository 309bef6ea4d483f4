"""Certified lottery tickets: sparse nets that match the dense one in clean and in verified accuracy (spec c.10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUNDING = 1e-9  # points; a tie counts as a match


@dataclass(frozen=True)
class Record:
    """One level of a lottery chain: density in (0, 1]; accuracies in percent of all images."""

    density: float
    clean: float
    verified: float


def matching(records: Sequence[Record], clean_tau: float, verified_tau: float) -> list[Record]:
    """The sparse records that lose at most clean_tau and verified_tau points against the dense one.

    Raises:
        ValueError: no record of density 1, or more than one.
    """
    dense = [record for record in records if record.density == 1]
    if len(dense) != 1:
        raise ValueError(f"records must hold one dense level (density 1), got {len(dense)}")
    return [
        record
        for record in records
        if record.density < 1
        and record.clean >= dense[0].clean - clean_tau - ROUNDING
        and record.verified >= dense[0].verified - verified_tau - ROUNDING
    ]


def find_ticket(records: Sequence[Record], tau: float = 0.0) -> Record | None:
    """The sparsest level within tau points of the dense one in both accuracies; None if there is none.

    tau = 0 is the strict sense, tau = 1 "matching"; the paper's own tolerance is not known.
    """
    return min(matching(records, tau, tau), key=lambda record: record.density, default=None)
