"""The lm_head of one call: shards of the vocabulary over a process group that work together (tensor
parallel), or a whole one, which `gathering.py` makes of shards (FSDP2, ZeRO-3)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from grpo_fast.checks import FLOATS, fail

from .backend import Backend
from .gathering import Source, gathered, is_dtensor, is_zero3
from .torch_backend import token_terms, without_gradient


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the vocabulary that this rank holds, [first, last), and those of the others."""

    group: dist.ProcessGroup
    ends: Tensor
    """(W,) int64: `last` of each rank."""
    first: int
    last: int
    V: int
    """Rows of all ranks together."""
    widest: int
    """Rows of the rank that holds most: what every rank sizes its chunks by."""
    tokens: tuple[int, ...] | None = None
    """Rows of hidden that each rank brought; None: all ranks brought the same ones."""

    @property
    def empty(self) -> bool:
        """True when no row is here: one that nothing reads stands for them."""
        return self.first == self.last

    def owned(self, ids: Tensor, elsewhere: int) -> Tensor:
        """Global ids (n,) -> rows of this shard, `elsewhere` where another rank holds them."""
        inside = (ids >= self.first) & (ids < self.last)
        return torch.where(inside, ids - self.first, torch.full_like(ids, elsewhere))

    def reduce(self, partial: Tensor) -> None:
        """Sum the parts of a gradient, one from each rank's columns, in place."""
        dist.all_reduce(partial, group=self.group)

    def reduce_rows(self, dhidden: Tensor) -> None:
        """`reduce` for dhidden (N, H): half of the traffic where a rank wants its own rows alone,
        and zeros in the others."""
        if self.tokens is None:
            self.reduce(dhidden)
            return
        rank, most = dist.get_rank(self.group), max(self.tokens)
        parts = dhidden.split(self.tokens)
        if len(set(self.tokens)) > 1:
            pad = torch.nn.functional.pad
            parts = [pad(p, (0, 0, 0, most - p.shape[0])) for p in parts]
        own = dhidden.new_empty(most, dhidden.shape[1])
        dist.reduce_scatter(own, [p.contiguous() for p in parts], group=self.group)
        first = sum(self.tokens[:rank])
        dhidden.zero_()
        dhidden[first : first + self.tokens[rank]] = own[: self.tokens[rank]]


def merge_stats(parts: Tensor, owner: Tensor) -> Tensor:
    """Row statistics of W shards of the vocabulary -> those of the whole, without cancellation.

        log_share = log(sum exp(z of the shard) / sum exp(z))                         # (W, n), <= 0
        logp = logp of the owner + log_share of the owner
        entropy = sum(share * (entropy of the shard - log_share))

    Every term of logp is <= 0 and every term of the entropy >= 0. A shard that is -inf throughout
    has no share; with all of them so, or a NaN in one, the row is NaN, as it is unsharded.

    Args:
        parts: (W, 4, n) logp, entropy, max, log-sum of each shard, logp read of the owner alone.
        owner: (n,) int64, the shard that holds the target.

    Returns:
        (4, n) logp, entropy, max over all shards, log-sum relative to it: `kernels/logprob.py`
        takes them with the logits of any one shard.
    """
    logp, entropy, peak, log_sum = parts.unbind(1)
    top = peak.amax(0)
    # peak is -inf where the shard is, and its log-sum NaN
    lse = torch.where(peak == -torch.inf, peak, (peak - top) + log_sum)
    best, place = lse.max(0)
    # the largest is kept out of the sum: log1p(rest) holds what log(1 + rest) would round away
    rest = torch.exp(lse - best).scatter(0, place[None], 0.0).sum(0)
    beside = torch.log1p(rest)
    log_share = (lse - best) - beside
    share = log_share.exp()
    parts_of_entropy = share * (entropy - log_share)
    mixed = torch.where(share == 0, torch.zeros_like(share), parts_of_entropy).sum(0)
    logp, log_share = (t.gather(0, owner[None])[0] for t in (logp, log_share))
    # a target in a shard that is -inf throughout: its own statistics are NaN
    logp = torch.where(log_share == -torch.inf, log_share, logp + log_share)
    return torch.stack((logp, mixed, top, best + beside))


def vocabulary_parallel(backend: Backend, shard: VocabularyShard) -> Backend:
    """The row functions over (1, n, V of this rank) logits and global ids.

    A forward costs one all-gather of (4, n) statistics, merged in the order of the ranks, so that
    every rank has the same bits; a backward costs none. Every rank has to make the same calls.
    """

    def logprob_fwd(logits: Tensor, ids: Tensor, stats: Tensor, **transform) -> None:
        own = torch.full(stats.shape, -torch.inf, dtype=stats.dtype, device=stats.device)
        if not shard.empty:
            backend.logprob_fwd(logits, shard.owned(ids, 0), own, **transform)
        parts = own.new_empty(shard.ends.numel(), *own.shape)
        dist.all_gather(list(parts.unbind(0)), own, group=shard.group)
        stats.copy_(merge_stats(parts, torch.bucketize(ids, shard.ends, right=True)))

    def logprob_bwd(logits, ids, stats, dlogp, out, **options) -> None:
        if shard.empty:
            out.zero_()
        else:
            backend.logprob_bwd(logits, shard.owned(ids, -1), stats, dlogp, out, **options)

    rows = backend._replace(logprob_fwd=logprob_fwd, logprob_bwd=logprob_bwd)
    return rows._replace(policy=_policy(rows))


def _policy(rows: Backend) -> Callable:
    """The policy row function made of the two others, with the objective on (n,) between them."""

    def policy(
        logits: Tensor,
        ids: Tensor,
        advantages: Tensor,
        weights: Tensor,
        terms: Tensor,
        out: Tensor | None,
        *,
        active: Tensor | None = None,
        inv_temperature: float | Tensor = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
        **objective: object,
    ) -> None:
        transform = {"inv_temperature": inv_temperature, "scale": scale, "softcap": softcap}
        stats = torch.empty(4, ids.numel(), dtype=terms.dtype, device=terms.device)
        rows.logprob_fwd(logits, ids, stats, active=active, **transform)
        found, dentropy = token_terms(*stats[:2], advantages, weights, **objective)
        terms.copy_(found)
        if out is not None:
            dlogp = found[5]
            options = {"active": ~without_gradient(dlogp, dentropy), "dentropy": dentropy}
            rows.logprob_bwd(logits, ids, stats, dlogp, out, **options, **transform)

    return policy


@dataclass
class Placement:
    """The lm_head of one call as this rank computes with it."""

    weight: Tensor
    """(V of this rank, H), or the gathered (V, H)."""
    bias: Tensor | None
    shard: VocabularyShard | None = None
    sources: dict[int, Source] = field(default_factory=dict)
    """Where the tensor at an address was gathered from."""

    @property
    def V(self) -> int:
        """Rows of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.V

    def rows(self, backend: Backend) -> Backend:
        """The row functions for it."""
        return backend if self.shard is None else vocabulary_parallel(backend, self.shard)

    def saved(self) -> AbstractContextManager:
        """An autograd function applied inside keeps no gathered tensor for its backward: it is
        gathered again there, on every rank."""
        if not self.sources:
            return nullcontext()
        # without self, whose weight would live as long as the graph
        sources = self.sources
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: sources.get(t.data_ptr()) or Source(t, t._version), Source.unpack
        )


def place(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    workspace_bytes: int | None = None,
    tp_tokens: tuple[int, ...] | None = None,
    **replicated: Tensor | None,
) -> Placement:
    """Where the head of a call is: here, gathered to here, or spread over tp_group.

    Args:
        hidden: (..., H), on every rank of tp_group the same.
        weight: (V, H); a DTensor or ZeRO-3 parameter of it, which is gathered: all ranks of the
            mesh or of DeepSpeed's group have to make the call, inside of a module's forward or
            outside. With tp_group this rank's rows (V_r, H), also as a DTensor Shard(0) over that
            group. Ranks may hold unequally many, in the order of the vocabulary. bias: likewise,
            or None.
        tp_tokens: see `Head`.
        replicated: ids, mask and what else decides how many rows are computed.

    Raises:
        ValueError: an argument that differs between the ranks of tp_group (on all of them, after
            one small all-gather, in the first call of its shapes), or that cannot be gathered; it
            is named.
    """
    if is_dtensor(hidden):
        fail("hidden", "a plain tensor (hidden.to_local() or .full_tensor())", "a DTensor")
    if tp_group is None:
        found = (gathered("weight", weight), gathered("bias", bias))
        sources = {t.data_ptr(): source for t, source in found if source is not None}
        return Placement(found[0][0], found[1][0], None, sources)
    if not isinstance(tp_group, dist.ProcessGroup):
        fail("tp_group", "a torch.distributed.ProcessGroup that this process is in", repr(tp_group))
    owner = getattr(weight, "_base", None)
    owner = weight if owner is None else owner
    weight, bias = _local("weight", weight, tp_group), _local("bias", bias, tp_group)
    for name, value in (("hidden", hidden), ("weight", weight)):
        if not isinstance(value, Tensor):
            fail(name, "a tensor", type(value).__name__)
    shard = _agreed(owner, tp_group, hidden, weight, bias, workspace_bytes, replicated)
    shard = replace(shard, tokens=tp_tokens)
    if shard.empty and weight.dim() == 2:
        # products and checks want a row, and this rank has to take part in every collective
        weight = torch.nn.functional.pad(weight, (0, 0, 0, 1))
        bias = None if bias is None else torch.nn.functional.pad(bias, (0, 1))
    return Placement(weight, bias, shard)


def _local(name: str, value: Tensor | None, group: dist.ProcessGroup) -> Tensor | None:
    """This rank's rows; of a DTensor with the gradient going back as one."""
    if is_zero3(value):
        fail("tp_group", f"None for a {name} of ZeRO-3", "a process group")
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Shard

    mesh = value.device_mesh
    ranks = dist.get_process_group_ranks(group)
    if value.placements != (Shard(0),) or mesh.mesh.tolist() != ranks:
        got = f"{value.placements} over ranks {mesh.mesh.tolist()}"
        fail(name, f"a DTensor of placements (Shard(0),) over the ranks {ranks} of tp_group", got)
    return value.to_local()


def _fingerprint(value: object, mask: object = None) -> list[Tensor | int]:
    """Number of elements and a sum that depends on every unmasked bit of a tensor and its place."""
    if not isinstance(value, Tensor):
        return [-1, 0]
    flat = value.detach().reshape(-1)
    if value is mask:
        flat = flat != 0
    elif isinstance(mask, Tensor) and mask.shape == value.shape and mask.device == value.device:
        flat = torch.where(mask.reshape(-1) != 0, flat, torch.zeros_like(flat))
    bits = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    odd = torch.arange(1, 2 * flat.numel(), 2, device=flat.device) * 0x9E3779B97F4A7C1
    return [flat.numel(), (bits * odd).sum()]


# weight (or what it is a view of) -> what the ranks agreed on, by group and shapes of the call.
# By the weight, because two heads may have as many rows here and unequally many elsewhere.
_AGREED = WeakIdKeyDictionary()
# Packed batches have another N in every call: the table starts anew, on every rank at once.
MOST_AGREED = 1024


def _kind(value: object) -> object:
    """What the ranks know of an argument without a look at its values."""
    if not isinstance(value, Tensor):
        return value if value is None or isinstance(value, int) else type(value)
    return tuple(value.shape), value.dtype, value.device, value.requires_grad


def _agreed(owner, group, hidden, weight, bias, workspace_bytes, replicated) -> VocabularyShard:
    """`_agree` in the first call of these shapes; later ones neither hash nor wait for a value.

    A mistake of the caller's, such as a batch that is not replicated, shows in the first call.
    """
    known = _AGREED.setdefault(owner, {})
    given = (hidden, weight, bias, workspace_bytes, *replicated.values())
    where = (id(group), group.group_name, weight.storage_offset())
    key = (*where, torch.is_grad_enabled(), *map(_kind, given))
    if key not in known:
        shard = _agree(group, hidden, weight, bias, workspace_bytes, replicated)
        if len(known) >= MOST_AGREED:
            known.clear()
        # without the group, which the table must not keep alive
        known[key] = {k: v for k, v in vars(shard).items() if k not in ("group", "tokens")}
    return VocabularyShard(group, **known[key])


def _agree(group, hidden, weight, bias, workspace_bytes, replicated) -> VocabularyShard:
    """Compare the arguments over the group before anything else can fail on one rank alone."""
    rows = weight.shape[0] if weight.dim() == 2 else 0
    facts = [
        ("hidden", "shape", [hidden.dim(), *hidden.shape[:4], *[0] * (4 - hidden.dim())]),
        ("hidden", "requires_grad", [int(torch.is_grad_enabled() and hidden.requires_grad)]),
        ("weight", "width", [weight.dim(), *weight.shape[1:2]] + [0] * (weight.dim() < 2)),
        ("bias", "presence", [int(bias is None)]),
        ("workspace_bytes", "value", [workspace_bytes if type(workspace_bytes) is int else -1]),
    ]
    for name, value in (("hidden", hidden), ("weight", weight)):
        facts.append((name, "dtype", [FLOATS.index(value.dtype) if value.dtype in FLOATS else -1]))
    mask = replicated.get("mask")
    for name in sorted(replicated, key=lambda name: name != "mask"):
        facts.append((name, "values", _fingerprint(replicated[name], mask)))
    flat = [x for _, _, numbers in facts for x in numbers]
    flat += [rows, bias.numel() if isinstance(bias, Tensor) else rows]
    own = torch.tensor([x if type(x) is int else 0 for x in flat], device=hidden.device)
    for at in (at for at, x in enumerate(flat) if isinstance(x, Tensor)):
        own[at] = flat[at]
    table = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(table.unbind(0)), own, group=group)
    seen = table.tolist()
    start = 0
    for name, what, numbers in facts:
        part = slice(start, start + len(numbers))
        start = part.stop
        for rank, other in enumerate(seen):
            if other[part] != seen[0][part]:
                # a fingerprint says nothing to a reader
                shown = ("some", "others") if what == "values" else (seen[0][part], other[part])
                got = f"{shown[0]} on rank 0 and {shown[1]} on rank {rank}"
                fail(name, f"the same {what} on every rank of tp_group", got)
    sizes = [row[-2] for row in seen]
    for rank, row in enumerate(seen):
        if row[-1] != row[-2]:
            fail("bias", f"({row[-2]},) as the weight of rank {rank} of tp_group", f"({row[-1]},)")
    if sum(sizes) == 0:
        fail("weight", "tensor (V_r, H), with rows on some rank of tp_group", "none on any")
    ends = torch.tensor(sizes).cumsum(0)
    last = int(ends[dist.get_rank(group)])
    ends = ends.to(hidden.device)
    return VocabularyShard(group, ends, last - rows, last, sum(sizes), max(sizes))
