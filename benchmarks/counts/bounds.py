"""Most instructions per logit that our kernels may have on sm_90: what `make test` holds.

A change that lowers a count lowers its bound; one that raises it says why.
"""

from __future__ import annotations

from .model import READ, REWRITE, WRITE

# Launch (`Case.name`) -> pass -> bound of the loop, with either Triton. 2026-11: 0.3 to 1 above the
# larger of the counts with 3.6.0 and 3.9.0.
BOUNDS: dict[str, dict[str, float]] = {
    "logprob_fwd bf16 V=151936": {READ: 34.0},
    "logprob_fwd fp16 V=151936": {READ: 34.0},
    "logprob_fwd fp32 V=151936": {READ: 33.0},
    "logprob_fwd bf16 V=151936 by-row mask": {READ: 34.0},
    "logprob_fwd bf16 V=50257": {READ: 36.5},
    "logprob_bwd bf16 V=151936": {REWRITE: 22.0},
    "logprob_bwd fp32 -> bf16 V=151936": {REWRITE: 21.5},
    "logprob_bwd fp32 V=151936": {REWRITE: 20.6},
    "logprob_bwd bf16 V=151936 dentropy": {REWRITE: 28.0},
    "logprob_bwd bf16 V=50257": {REWRITE: 26.3},
    "policy bf16 V=151936 off-policy no gradient": {READ: 34.5},
    "policy bf16 V=151936": {READ: 35.0, REWRITE: 22.6, WRITE: 1.0},
    "policy fp32 -> bf16 V=151936 off-policy": {READ: 33.5, REWRITE: 21.5, WRITE: 1.0},
    "policy bf16 V=151936 bonus": {READ: 35.0, REWRITE: 29.5, WRITE: 1.0},
    "policy fp32 -> bf16 V=50257 off-policy": {READ: 36.6, REWRITE: 28.5, WRITE: 5.8},
}
# Barriers of a program per 1,024 logits, of any of these; reading has 3.0 with Triton 3.9.0.
BARRIERS = {READ: 4.5, REWRITE: 0.5, WRITE: 0.0}
