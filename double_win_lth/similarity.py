"""How alike two masks are, and how alike they would be by chance (spec c)."""

from common.masks import Masks


def iou(a: Masks, b: Masks) -> float:
    """|a and b| / |a or b| over all entries. Raises ValueError on other names or shapes, or if both are empty."""
    _check(a, b)
    union = sum(int((a[name] | b[name]).sum()) for name in a)
    if not union:
        raise ValueError("masks must not both be empty")
    return sum(int((a[name] & b[name]).sum()) for name in a) / union


def chance_iou(density: float) -> float:
    """Expected IoU of two independent random masks of one density: d / (2 - d)."""
    return density / (2 - density)


def layerwise_chance_iou(a: Masks, b: Masks) -> float:
    """The same for masks that share nothing but their layers' densities a_l, b_l: sum(n a b) / sum(n (a + b - a b))."""
    _check(a, b)
    both = union = 0.0
    for name, mask in a.items():
        in_a, in_b = mask.float().mean().item(), b[name].float().mean().item()
        both += mask.numel() * in_a * in_b
        union += mask.numel() * (in_a + in_b - in_a * in_b)
    if not union:
        raise ValueError("masks must not both be empty")
    return both / union


def _check(a: Masks, b: Masks) -> None:
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (a, b)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"masks must have equal names and shapes, {odd[0]} differs")
