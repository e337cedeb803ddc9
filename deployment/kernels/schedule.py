"""How a page is cut up for decoding: into parts, one to a team of warps at a time.

A GPU runs so many teams at once. If there are fewer parts than that, some of it idles; if there are a few more, most of it idles while the
last ones run. A part is whole chunks.
"""

from functools import cache

import torch

CHUNK = 128  # tokens that a team takes at a time
_MOST_SPLITS = 1024
_START = 5.0  # what a team does before its first chunk, in chunks
_PART = 0.02  # what `combine` does for a part
_CROWD = 3.0  # what it costs if `combine` finds no room beside `attend`


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a CPU gets two, so that splitting is tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def parts_of(tokens: int, streams: int, teams: int, roomy: int = 0) -> int:
    """Parts of a page of so many tokens, of each stream: those with which `teams` at once are done first.

    How many of the tokens there are only the device knows, so parts need not be alike in whole chunks. Beside more than `roomy` teams (if not 0)
    the kernel that puts parts together cannot begin.
    """
    chunks = max(1, -(-tokens // CHUNK))

    def cost(parts: int) -> float:
        crowd = _CROWD if 0 < roomy < streams * parts else 0
        return -(-streams * parts // teams) * (chunks / parts + _START) + _PART * parts + crowd

    return min(range(1, min(_MOST_SPLITS, chunks) + 1), key=cost)
