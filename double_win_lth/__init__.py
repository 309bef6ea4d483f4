"""Double-win lottery tickets from robust pre-training (arXiv 2206.04762)."""

from double_win_lth.grouped import stack_tickets
from double_win_lth.matching import double_win
from double_win_lth.pgd import pgd_linf
from double_win_lth.regimes import Regime
from double_win_lth.similarity import iou
from double_win_lth.tickets import TicketBook, find_tickets, one_shot_tickets

__all__ = [
    "Regime",
    "TicketBook",
    "double_win",
    "find_tickets",
    "iou",
    "one_shot_tickets",
    "pgd_linf",
    "stack_tickets",
]
