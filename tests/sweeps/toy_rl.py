"""A toy task that a tiny transformer learns with a GRPO loss in 300 optimizer steps on a CPU core.

A prompt is four tokens of one class; the reward is the share of the 16 places that hold a token of
that class. Eight stop tokens end a completion, so that lengths differ until the model has learned
not to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_fast import LossConfig
from grpo_fast.advantages.group import group_advantages

V, H, HEADS, LAYERS = 200, 64, 4, 2
STOPS, CLASSES, CLASS_SIZE = 8, 4, 48
PROMPT, COMPLETION = 4, 16
PROMPTS, GROUP = 8, 8
# optimizer steps on each batch of rollouts
REUSE = 2
LEARNING_RATE = 4e-3

# (hidden, weight, ids, advantages, config, mask, old_logp, ref_logp)
# -> loss, entropy, clipped share of the tokens
Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]
# (hidden, weight, ids) -> logp
Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm attention and MLP; `cache` is a list of the keys and values seen so far."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(H)) for _ in range(2)])
        self.qkv, self.out = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H, bias=False)
        self.up, self.down = nn.Linear(H, 2 * H, bias=False), nn.Linear(2 * H, H, bias=False)

    def forward(self, x: Tensor, cache: list | None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(F.rms_norm(x, (H,), self.norms[0]))
        q, k, v = qkv.view(B, T, 3, HEADS, H // HEADS).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = k, v
        # written out: the fused one takes 45 ms for its bf16 backward on a CPU
        hidden = torch.ones(T, k.shape[2], dtype=torch.bool).triu(k.shape[2] - T + 1)
        scores = (q @ k.transpose(2, 3) * (H // HEADS) ** -0.5).float()
        seen = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype) @ v
        x = x + self.out(seen.transpose(1, 2).reshape(B, T, H))
        return x + self.down(F.silu(self.up(F.rms_norm(x, (H,), self.norms[1]))))


class Tiny(nn.Module):
    """A causal transformer without its head: ids (B, T) -> hidden (B, T, H)."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, H), nn.Embedding(PROMPT + COMPLETION, H)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.Parameter(torch.ones(H))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        head = self.tokens.weight if tied else nn.Parameter(torch.randn(V, H) * 0.5 / H**0.5)
        self.head = head

    def forward(self, ids: Tensor, caches: list | None = None, start: int = 0) -> Tensor:
        x = self.tokens(ids) + self.places.weight[start : start + ids.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return F.rms_norm(x, (H,), self.norm)


@dataclass
class Curves:
    """What one run leaves: a number for every optimizer step."""

    reward: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    """A checksum of the tokens that were sampled."""


@torch.no_grad()
def sample(model: Tiny, prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Completions (B, 16) at temperature 1, and the mask of what counts: up to the first stop
    token, it included."""
    caches: list[list] = [[] for _ in range(LAYERS)]
    ids, hidden = prompts, model(prompts, caches)
    for _ in range(COMPLETION):
        logits = (hidden[:, -1] @ model.head.T).float()
        # Gumbel noise and not multinomial: arms that agree to a few bits draw the same tokens
        noise = torch.rand(logits.shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
        token = (logits - (-noise.log()).log()).argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), 1)
        if ids.shape[1] < PROMPT + COMPLETION:
            hidden = model(token, caches, ids.shape[1] - 1)
    completions = ids[:, PROMPT:]
    stopped = (completions < STOPS).long().cumsum(1) - (completions < STOPS).long()
    return completions, stopped == 0


def score(completions: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """Share of the 16 places that hold a token of the wanted class before the end, (B,)."""
    classes = torch.where(completions < STOPS, -1, (completions - STOPS) // CLASS_SIZE)
    return ((classes == wanted[:, None]) & mask).float().mean(1)


def draw_prompts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts (64, 4) of tokens of one class, each repeated over its group, and that class."""
    wanted = torch.randint(CLASSES, (PROMPTS,), generator=generator)
    within = torch.randint(CLASS_SIZE, (PROMPTS, PROMPT), generator=generator)
    ids = STOPS + wanted[:, None] * CLASS_SIZE + within
    return ids.repeat_interleave(GROUP, 0), wanted.repeat_interleave(GROUP)


class Optimizer:
    """AdamW on fp32 master weights; where the model holds bf16, it is a rounded copy of them."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.adam = torch.optim.AdamW(
            self.masters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        )

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
            parameter.grad = None


def train(
    seed: int,
    config: LossConfig,
    loss: Loss,
    logprob: Logprob,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    steps: int = 300,
) -> Curves:
    """One run. Seeds decide the weights, the prompts and the noise of sampling, whatever the
    loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    model = Tiny(tied).to(dtype)
    initial = Tiny(tied).to(dtype).requires_grad_(False)
    initial.load_state_dict(model.state_dict())
    optimizer, curves = Optimizer(model), Curves()
    for _ in range(math.ceil(steps / REUSE)):
        prompts, wanted = draw_prompts(generator)
        completions, mask = sample(model, prompts, generator)
        rewards = score(completions, mask, wanted)
        checksum = (completions.flatten() * torch.arange(1, completions.numel() + 1)).sum().item()
        advantages = group_advantages(rewards.view(PROMPTS, GROUP)).view(-1)
        # position t predicts the token at t + 1
        ids = torch.cat((prompts, completions), 1)[:, :-1]
        with torch.no_grad():
            old = logprob(model(ids)[:, PROMPT - 1 :], model.head, completions)
            ref = None
            if config.beta:
                ref = logprob(initial(ids)[:, PROMPT - 1 :], initial.head, completions)
        for _ in range(min(REUSE, steps - len(curves.loss))):
            hidden = model(ids)[:, PROMPT - 1 :]
            value, entropy, clipped = loss(
                hidden, model.head, completions, advantages, config, mask, old, ref
            )
            value.backward()
            optimizer.step()
            curves.reward.append(rewards.mean().item())
            curves.entropy.append(entropy.item())
            curves.loss.append(value.item())
            curves.clipped.append(clipped.item())
            curves.length.append(mask.sum().item() / len(mask))
            curves.drawn.append(checksum)
    return curves
