"""Metrics between two logs: averages on the host, token statistics on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# the loss's means over tokens, its counts, and extrema as the largest value of sign * metric
MEANS = ("kl", "entropy", "clip_low", "clip_high", "clip_ratio", "ratio_mean")
# those that a trainer adds where it takes them
FURTHER_MEANS = ("approx_kl", "kl_to_old", "value_loss", "value_clip_ratio", "aux_loss")
COUNTS = ("tokens", "active_rows", "nonfinite_tokens", "clamped_ratios")
EXTREMA = (("clip_low", -1.0), ("clip_high", 1.0), ("ratio_min", -1.0), ("ratio_max", 1.0))


class Metrics:
    """Metrics between two logs: host averages, and token statistics in one tensor on the device.

    Adding never synchronises with the device. `reduce` takes one gather of the tensor over the
    ranks and one transfer to the host; with several ranks also one gather of the host averages.
    """

    def __init__(self, device: torch.device, means: tuple[str, ...] = MEANS) -> None:
        self.means = means
        # sums over many tokens outgrow the integers that float32 holds; MPS has nothing wider
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.reset()

    @property
    def _sums(self) -> int:
        return len(self.means) + len(COUNTS) + 1

    def reset(self) -> None:
        """Forget everything added so far."""
        self.host: dict[str, list] = {}
        sums = torch.zeros(self._sums, dtype=self._dtype, device=self._device)
        extrema = torch.full((len(EXTREMA),), -math.inf, dtype=self._dtype, device=self._device)
        self.device = torch.cat([sums, extrema])

    def add(self, name: str, value: float, how: str = "mean") -> None:
        """Add a host number; how = mean (NaN is left out), min or max, over the adds and ranks."""
        value = float(value)
        entry = [value, 1, how] if not math.isnan(value) else [0.0, 0, how]
        self.host[name] = _merge(self.host.get(name), entry)

    def add_tokens(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one micro-batch of the loss; its means are weighted by its tokens."""
        with torch.no_grad():
            zero = metrics["tokens"].new_zeros((), dtype=self._dtype)
            get = {k: v.detach().to(self._dtype) for k, v in metrics.items()}
            tokens = get["tokens"]
            means = torch.stack([get.get(name, zero) for name in self.means])
            means = torch.where(tokens > 0, means * tokens, torch.zeros_like(means))
            counts = torch.stack([get.get(name, zero) for name in COUNTS])
            sums = torch.cat([means, counts, torch.ones_like(means[:1])])
            extrema = torch.stack([sign * get[name] for name, sign in EXTREMA])
            extrema = torch.where(tokens > 0, extrema, torch.full_like(extrema, -math.inf))
            size = len(sums)
            highest = torch.maximum(self.device[size:], extrema)
            self.device = torch.cat([self.device[:size] + sums, highest])

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """All metrics over all ranks; `tokens/*` keys are the token statistics."""
        device, hosts = self.device[None], [self.host]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            device, hosts = accelerator.gather(device), gather_object(hosts)
        size = self._sums
        values = torch.cat([device[:, :size].sum(0), device[:, size:].amax(0)]).tolist()
        merged: dict[str, list] = {}
        for host in hosts:
            for name, entry in host.items():
                merged[name] = _merge(merged.get(name), entry)
        out = {name: _value(entry) for name, entry in merged.items()}
        out.update(_token_metrics(values, self.means))
        return out

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: floats survive the way through text unchanged."""
        return {"host": self.host, "device": self.device.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.host = {name: list(entry) for name, entry in state["host"].items()}
        self.device = torch.tensor(state["device"], dtype=self._dtype, device=self._device)


def _merge(entry: list | None, other: list) -> list:
    if entry is None or not entry[1]:
        return list(other)
    if not other[1]:
        return entry
    pick: Callable = {"min": min, "max": max}.get(entry[2], lambda a, b: a + b)
    return [pick(entry[0], other[0]), entry[1] + other[1], entry[2]]


def _value(entry: list) -> float:
    total, count, how = entry
    if not count:
        return math.nan
    return total / count if how == "mean" else total


def _token_metrics(values: list[float], means: tuple[str, ...]) -> dict[str, float]:
    names = (*means, *COUNTS, "micro_batches")
    sums = dict(zip(names, values, strict=False))
    if not sums["micro_batches"]:
        return {}
    tokens = max(sums["tokens"], 1.0)
    out = {f"tokens/{name}": sums[name] / tokens for name in means}
    out.update({f"tokens/{name}": sums[name] for name in COUNTS})
    for (name, sign), value in zip(EXTREMA, values[len(names) :], strict=True):
        suffix = "" if name.startswith("ratio") else ("_max" if sign > 0 else "_min")
        out[f"tokens/{name}{suffix}"] = sign * value if math.isfinite(value) else math.nan
    return out


def loss_metrics(
    values: dict[str, float], loss_type: str, kl: bool, ratios: bool
) -> dict[str, float]:
    """Token statistics under TRL's names, out of what `Metrics.reduce` returned.

    Means are over tokens; clip_ratio/low_min and high_max are extrema over micro-batches and ranks.
    active_rows is the share of tokens that had a gradient; nonfinite_tokens and clamped_ratios are
    counts. `ratios` adds ratio/{min,mean,max}.
    """
    if "tokens/tokens" not in values:
        return {}
    out = {
        "entropy": values["tokens/entropy"],
        "active_rows": values["tokens/active_rows"] / max(values["tokens/tokens"], 1.0),
        "nonfinite_tokens": values["tokens/nonfinite_tokens"],
        "clamped_ratios": values["tokens/clamped_ratios"],
    }
    if kl:
        out["kl"] = values["tokens/kl"]
    further = [name for name in FURTHER_MEANS if f"tokens/{name}" in values]
    out.update({name: values[f"tokens/{name}"] for name in further})
    if loss_type == "cispo":
        out["cispo_clip_ratio"] = values["tokens/clip_high"]
    else:
        out["clip_ratio/low_mean"] = values["tokens/clip_low"]
        out["clip_ratio/low_min"] = values["tokens/clip_low_min"]
        out["clip_ratio/high_mean"] = values["tokens/clip_high"]
        out["clip_ratio/high_max"] = values["tokens/clip_high_max"]
        out["clip_ratio/region_mean"] = values["tokens/clip_ratio"]
    if ratios:
        out["ratio/min"] = values["tokens/ratio_min"]
        out["ratio/mean"] = values["tokens/ratio_mean"]
        out["ratio/max"] = values["tokens/ratio_max"]
    return out


def add_rollouts(
    metrics: Metrics, names: list[str], rewards: Tensor, total: Tensor, lengths: Tensor, cut: Tensor
) -> None:
    """Add the metrics of one generation batch.

    Args:
        names: (K) reward names.
        rewards: (B, K) of all ranks, NaN = unscorable.
        total: (P, G) weighted rewards, B = P * G.
        lengths: (B,) tokens of each completion.
        cut: (B,) bool, True where no end-of-sequence token came.
    """
    for column, name in enumerate(names):
        scored = rewards[:, column][~rewards[:, column].isnan()].double()
        metrics.add(f"rewards/{name}/mean", scored.mean() if len(scored) else math.nan)
        metrics.add(f"rewards/{name}/std", scored.std() if len(scored) > 1 else math.nan)
    metrics.add("reward", total.double().nanmean())
    stds = [group[~group.isnan()].double() for group in total]
    stds = [float(group.std()) for group in stds if len(group) > 1]
    metrics.add("reward_std", sum(stds) / len(stds) if stds else math.nan)
    flat = sum(1 for std in stds if std < 1e-8) + (len(total) - len(stds))
    metrics.add("frac_reward_zero_std", flat / len(total))
    for prefix, chosen in (("", lengths), ("terminated_", lengths[~cut])):
        if len(chosen):
            metrics.add(f"completions/mean_{prefix}length", chosen.double().mean())
            metrics.add(f"completions/min_{prefix}length", chosen.min(), "min")
            metrics.add(f"completions/max_{prefix}length", chosen.max(), "max")
    metrics.add("completions/clipped_ratio", cut.double().mean())
