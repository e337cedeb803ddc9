"""Dense-and-sparse quantization (KVQuant, section 3.4): which elements are kept exactly.

On a channel-wise axis the thresholds are static: the element lies outside its channel's calibrated range. On a
token-wise axis they are dynamic: a fixed number of elements at each end of the token. Both select exactly the
promised number under ties, earlier channels first, so that a kernel can reproduce the choice bit for bit.
"""

import math

import torch
from torch import Tensor


def outliers_per_end(channels: int, share: float) -> int:
    """n = ceil(C * p / 2): outliers at each end of a token of C channels; something is always left between them."""
    # rounded first, lest 200 * 0.01 / 2 become 2 in one place and 1.0000000000000002 in another
    return min(math.ceil(round(channels * share / 2, 9)), max(0, channels - 1) // 2)


def extreme_elements(x: Tensor, per_end: int) -> Tensor:
    """Mask of the `per_end` largest and `per_end` smallest elements along the last axis, ties broken so that there are no more.

    Raises ValueError when they would leave no element over.
    """
    if per_end == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    if 2 * per_end >= x.shape[-1]:
        raise ValueError(f"{per_end} outliers at each end leave nothing of {x.shape[-1]} channels")
    largest = _largest(x, per_end)
    return largest | _largest(torch.where(largest, -torch.inf, -x), per_end)


def cap_outliers(mask: Tensor, distance: Tensor, cap: int) -> Tensor:
    """Keep at most `cap` of a token's outliers (last axis), those at the greatest distance."""
    if cap == 0:
        return torch.zeros_like(mask)
    if cap >= mask.shape[-1]:
        return mask
    return mask & _largest(torch.where(mask, distance, -torch.inf), cap)


def _largest(x: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest elements along the last axis; ties go to the lowest index."""
    threshold = x.topk(count, dim=-1).values[..., -1:]
    at_least = x >= threshold
    if at_least.sum() == count * threshold.numel():
        return at_least
    above = x > threshold
    tied = at_least & ~above
    room = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
