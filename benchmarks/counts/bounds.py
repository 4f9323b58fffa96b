"""Most instructions per logit that our kernels may have on sm_90: what `make test` holds.

A change that lowers a count lowers its bound; one that raises it says why.
"""

from __future__ import annotations

from .model import MERGE, READ, REWRITE, WRITE

# Launch (`Case.name`) -> pass -> bound of the loop, with either Triton. 2026-11: 0.2 to 0.5 above
# the larger of the counts with 3.6.0 and 3.9.0, which differ by at most 0.2.
BOUNDS: dict[str, dict[str, float]] = {
    "logprob_fwd bf16 V=151936": {READ: 10.3},
    "logprob_fwd fp16 V=151936": {READ: 9.8},
    "logprob_fwd fp32 V=151936": {READ: 8.9},
    "logprob_fwd bf16 V=151936 no entropy": {READ: 7.0},
    "logprob_fwd fp32 V=151936 no entropy": {READ: 5.7},
    "logprob_fwd bf16 V=151936 by-row mask": {READ: 10.3},
    "logprob_fwd bf16 V=151936 softcap": {READ: 37.5},
    "logprob_fwd bf16 V=50257": {READ: 12.3},
    "logprob_fwd bf16 V=262144 rows=64": {READ: 10.3, MERGE: 1.0},
    "logprob_bwd bf16 V=151936": {REWRITE: 5.8},
    "logprob_bwd fp32 -> bf16 V=151936": {REWRITE: 4.5},
    "logprob_bwd fp32 V=151936": {REWRITE: 4.4},
    "logprob_bwd bf16 V=151936 dentropy": {REWRITE: 7.9},
    "logprob_bwd fp32 -> bf16 V=151936 dentropy": {REWRITE: 6.7},
    "logprob_bwd bf16 V=151936 softcap": {REWRITE: 35.5},
    "logprob_bwd bf16 V=50257": {REWRITE: 9.0},
    "policy bf16 V=151936 off-policy no gradient": {READ: 10.3},
    "policy bf16 V=151936": {READ: 10.3, REWRITE: 6.0, WRITE: 0.8},
    "policy fp32 -> bf16 V=151936 off-policy": {READ: 8.9, REWRITE: 4.5, WRITE: 0.8},
    "policy bf16 V=151936 bonus": {READ: 10.3, REWRITE: 8.0, WRITE: 0.8},
    "policy fp32 -> bf16 V=50257 off-policy": {READ: 10.3, REWRITE: 8.2, WRITE: 3.4},
}
# Barriers of a program per 1,024 logits of a loop, of any of these.
BARRIERS = {READ: 0.0, REWRITE: 0.0, WRITE: 0.0, MERGE: 0.1}
