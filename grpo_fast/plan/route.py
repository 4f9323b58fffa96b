"""Which route a call takes, and what it costs: known before any vocabulary-sized work.

Costs are in multiples of NHV: one product of the lm_head with N rows is 2NHV FLOPs. With n unmasked
rows of which g may have a gradient and a have one:

    forward only   2n            no gradient is wanted
    one pass       2n + 4g       logits of a chunk -> objective -> dlogits in place -> gradients
    two passes     2n + 6a       log-probs of all, objective, backward on the rows that have one
    frozen head    2n + 2g       the forward also keeps dlogp / dhidden; backward scales its rows

2NHV less per row of g or a where hidden or the weight needs no gradient.

On the kernels, with a bf16 weight, dlogits of up to 2H rows wait as bf16 where the fp32 dweight
was, and dweight is one product of them all; of more rows in groups of H (`engine/held.py`). That
changes no product and no route, but chunks of few rows need no slices of the vocabulary any more.

An accelerator makes the host wait once in a call, for the counts of rows (`rows.flatten`), and
two passes wait once more, for the rows that have a derivative: how many is known after the first
pass only, and the second is that much shorter. With max_rows nothing is waited for, and rows
without a derivative are zeros in the products. Boundaries on the host or the device, numbers on
the host and backward add nothing; a vocabulary over several ranks adds the comparison of their
arguments. The row functions of `torch_backend`, for accelerators without our kernels, look at the
mask of each block of logits that comes with one: with max_rows or from logits, they wait there.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUTES = {
    "forward_only": "no gradient is wanted",
    "one_pass": "a token's derivative needs its own log-prob alone",
    "known_derivative": "on-policy: every derivative is known before the pass",
    "whole_sequences": "a derivative needs the log-probs of its sequence, and every sequence fits "
    "a chunk",
    "frozen_head": "the head needs no gradient: the forward keeps dlogp / dhidden",
    "two_passes": "log-probs of all rows, then backward on those that have a derivative",
}


@dataclass(frozen=True)
class Facts:
    """What the choice of a route goes by."""

    n_rows: int
    """Rows of hidden, masked ones too."""
    n_tokens: int
    """Unmasked tokens."""
    n_unmasked: int
    """Rows that are computed: fewer with skip_inactive_forward."""
    n_gradient: int
    """Rows that may have a gradient."""
    longest: int | None
    """Rows of the longest sequence among them; None when nobody knows."""
    H: int
    V: int
    rank: int
    """Rank of an adapter of the lm_head; 0 for none."""
    itemsize: int
    """Bytes of a logit in the workspace."""
    needs_hidden: bool
    needs_weight: bool
    needs_other: bool
    """A gradient of the bias or of an adapter."""
    per_sequence: bool
    per_batch: bool
    known: bool
    fp16: bool
    """dlogits are stored in fp16, whose scale has to fit the largest of them."""
    bonus: bool
    """An entropy bonus."""
    top_share: float
    chunk_rows: int
    fixed: bool
    """The counts are a capacity: nothing is read back from the device."""
    columns_first: bool
    """Backward goes through the vocabulary a slice at a time (too few rows in a chunk)."""
    held: int = 0
    """Rows whose narrow dlogits wait for one product of dweight; `engine.held.held_rows`."""

    @property
    def one_product(self) -> bool:
        """dweight is one product, rounded once."""
        return self.needs_weight and 0 < self.n_gradient <= self.held


@dataclass(frozen=True)
class Plan:
    """A route, why it was taken, and what it costs at most."""

    route: str
    """Key of `ROUTES`."""
    reason: str
    facts: Facts
    nhv: float
    """Products with the lm_head in units of NHV over the unmasked tokens, at most."""
    flops: int
    """Of those products, at most."""
    n_chunks: int
    workspace_bytes: int
    """Logits of one chunk."""
    gradient_bytes: int
    """fp32 accumulators of the gradients; a dweight of one product in the type of the weight."""
    held_bytes: int = 0
    """dlogits that wait for that product."""

    def __str__(self) -> str:
        f = self.facts
        share = f.n_gradient / max(f.n_tokens, 1)
        return "\n".join(
            (
                f"route        {self.route}: {self.reason}",
                f"rows         {f.n_tokens} unmasked, {f.n_unmasked} computed, {f.n_gradient} "
                f"({share:.0%}) may have a gradient",
                f"head         H = {f.H}, V = {f.V}"
                + (f", adapter of rank {f.rank}" if f.rank else ""),
                f"products     at most {self.nhv:.2f} NHV = {self.flops / 1e12:.3f} TFLOP",
                f"chunks       {self.n_chunks} of at most {f.chunk_rows} rows",
                f"workspace    {self.workspace_bytes / 2**20:.1f} MiB of logits",
                f"gradients    {self.gradient_bytes / 2**20:.1f} MiB "
                + ("in fp32" if not f.one_product else "(dweight as the weight)"),
                *self._held(),
            )
        )

    def _held(self) -> list[str]:
        f, size = self.facts, self.held_bytes / 2**20
        if not size:
            return []
        of = "all of them" if f.one_product else f"{f.held} rows"
        return [f"held         {size:.1f} MiB of dlogits: dweight is a product of {of}"]


def choose(facts: Facts) -> Plan:
    """The cheapest route that is valid."""
    route, reason = _route(facts)
    n, g = facts.n_unmasked, facts.n_gradient
    backward = 2 * (facts.needs_hidden + facts.needs_weight)
    cost = {
        "forward_only": 2 * n,
        "frozen_head": 2 * n + 2 * g,
        "two_passes": 2 * n + (2 + backward) * g * facts.top_share,
    }.get(route, 2 * n + backward * g)
    rows = min(facts.chunk_rows, max(n, 1))
    # a narrow type has 2 bytes
    by_weight = 2 if facts.one_product else facts.itemsize
    return Plan(
        route,
        reason,
        facts,
        nhv=cost / max(facts.n_tokens, 1),
        flops=int(cost * (facts.H + facts.rank) * facts.V),
        n_chunks=-(-n // facts.chunk_rows),
        workspace_bytes=rows * facts.V * facts.itemsize,
        gradient_bytes=facts.H
        * (
            by_weight * facts.needs_weight * facts.V
            + facts.itemsize * facts.needs_hidden * facts.n_rows
        ),
        held_bytes=2 * facts.V * facts.held if facts.held > facts.chunk_rows else 0,
    )


def _route(f: Facts) -> tuple[str, str]:
    if not (f.needs_hidden or f.needs_weight or f.needs_other):
        return "forward_only", ROUTES["forward_only"]
    by_itself = not f.per_sequence and not f.per_batch
    fits = f.longest is not None and f.longest <= f.chunk_rows
    if f.columns_first:
        obstacle = f"chunks of {f.chunk_rows} rows, so that backward takes slices of the vocabulary"
    elif by_itself and not f.fp16:
        return "one_pass", ROUTES["one_pass"]
    elif f.known:
        return "known_derivative", ROUTES["known_derivative"]
    elif f.per_batch:
        obstacle = "a derivative needs the entropies of the whole batch"
    elif f.fp16:
        obstacle = "dlogits in fp16 need a scale that fits the largest derivative"
    elif f.fixed:
        obstacle = "the lengths of the sequences stay on the device"
    elif fits:
        return "whole_sequences", ROUTES["whole_sequences"]
    else:
        obstacle = f"a sequence of {f.longest} rows does not fit a chunk of {f.chunk_rows}"
    frozen = f.needs_hidden and not (f.needs_weight or f.needs_other or f.bonus)
    if frozen and f.top_share >= 0.5:
        return "frozen_head", f"{ROUTES['frozen_head']} ({obstacle})"
    return "two_passes", obstacle
