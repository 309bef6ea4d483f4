"""Where a plan saves its multiply-adds, and what the authors' logs say about theirs (claims C7, C8 of the README)."""

from uvc_vit.adapter import BlockDims
from uvc_vit.macs import block_macs
from uvc_vit.plan import Plan

DEIT_BASE = (BlockDims(768, 64, (64,) * 12, 3072), 197, 115_605_504)  # sizes, tokens, multiply-adds of the embedding
BASE_LOG = {6: 0.5032912, 7: 0.4205064, 8: 0.3377216, 11: 0.0893671}  # blocks skipped: "real FLOPs" of the log


def skipped_share(plan: Plan, tokens: int, embed_macs: int) -> float:
    """Part of the saved multiply-adds that skipped blocks save, whole, whatever else went of them; 0 of nothing saved.

    It is 1 by construction where no block is left.
    """
    whole = [block_macs(sizes, tokens).total for sizes in plan.sizes]
    saved = embed_macs + sum(whole) - plan.macs(tokens, embed_macs)
    by_skips = sum(cost for cost, keep in zip(whole, plan.keep_block, strict=True) if not keep)
    return by_skips / saved if saved else 0.0


def log_error() -> float:
    """Largest distance of the log's values from what skipping that many of DeiT-Base's 12 blocks leaves."""
    sizes, tokens, embed = DEIT_BASE
    block = block_macs(sizes, tokens).total
    return max(abs(1 - count * block / (embed + 12 * block) - value) for count, value in BASE_LOG.items())
