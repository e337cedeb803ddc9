"""The methods of others as schemes of ours, so that all run through the same fit, simulation and byte count.

`Scheme.parse("kivi2")` is a name for the fields below with 2 bits; options may change any of them. All keep one sink
token, as everything here does. None but `datafree` has outliers, and none looks at calibration data.
"""

from typing import Any

_PER_TOKEN_AFTER_ROPE = {"datatype": "int", "key_axis": "token", "value_axis": "token", "key_rope": "post"}

PRESETS: dict[str, dict[str, Any]] = {
    # Atom (arXiv 2310.19102) and FlexGen (arXiv 2303.06865): asymmetric integers per token, in groups of channels
    "atom": {**_PER_TOKEN_AFTER_ROPE, "group": 128},
    "flexgen": {**_PER_TOKEN_AFTER_ROPE, "group": 64},
    # KIVI (arXiv 2402.02750): groups of 32 tokens for keys, of 32 channels for values, and a window of recent tokens
    "kivi": {
        "datatype": "int",
        "key_axis": "channel",
        "channel_range": "online",
        "value_axis": "token",
        "group": 32,
        "key_rope": "post",
        "residual_tokens": 128,
    },
    # TurboQuant (arXiv 2504.19874) in its form for the mean squared error: rotate, scale by the norm, Lloyd-Max levels
    "turbo": {"datatype": "lloyd", "key_rope": "post"},
    # NormalFloat keys per channel with the sequence's own ranges and 2 % outliers: KVQuant without a calibration
    "datafree": {"datatype": "nf", "channel_range": "online", "outliers": 0.02},
}
