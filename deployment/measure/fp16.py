"""fp16 baselines: decode and prefill attention over an fp16 cache, in several ways, against which the packed cache is timed.

A decode step has one query per head. torch's SDPA takes grouped queries with `enable_gqa`, but not every backend does
that well, so the H / G queries of a KV head are also folded into one problem of as many queries, `[B, G, H/G, D]`
against `[B, G, T, D]`: exact, since a decode step masks nothing. The fastest of them all is what counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from deployment.measure.synthetic import Case, Shape

Call = Callable[[], Tensor]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def prefill_calls(case: Case, new: int, shape: Shape) -> dict[str, Call]:
    """Ways of attending a chunk of `new` queries over all tokens and itself, causally, in a cache that holds both; as `decode_calls`."""
    query, mask = _queries(case, new, shape), causal_lower_right(new, case.key.shape[2] + new)
    key, value = (torch.cat([held, held[:, :, -1:].expand(-1, -1, new, -1)], 2) for held in (case.key, case.value))

    def by(backends: list[SDPBackend]) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(backends):
                return scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, enable_gqa=shape.heads != shape.kv_heads
                )

        return call

    if not key.is_cuda:
        return {"sdpa": by([*_BACKENDS.values(), SDPBackend.MATH])}
    return {name: by([backend]) for name, backend in _BACKENDS.items() if name != "efficient"}


def decode_calls(case: Case, shape: Shape) -> dict[str, Call]:
    """Ways of attending one query per head, by name; some of them may raise RuntimeError, on some devices or shapes."""
    query = _queries(case, 1, shape)
    folded = query.view(len(query), shape.kv_heads, -1, shape.head_dim)
    grouped = shape.heads != shape.kv_heads
    calls: dict[str, Call] = {
        "sdpa": lambda: scaled_dot_product_attention(query, case.key, case.value, enable_gqa=grouped)
    }
    if grouped:
        calls["sdpa folded"] = lambda: scaled_dot_product_attention(folded, case.key, case.value)
    if case.key.is_cuda:
        suffix = " folded" if grouped else ""
        calls |= {f"{name}{suffix}": _by(backend, folded, case) for name, backend in _BACKENDS.items()}
    return calls


def _by(backend: SDPBackend, query: Tensor, case: Case) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, case.key, case.value)

    return call


def _queries(case: Case, new: int, shape: Shape) -> Tensor:
    return torch.randn(len(case.key), shape.heads, new, shape.head_dim, device=case.key.device).half()
