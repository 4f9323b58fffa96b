"""Makes the calls of `compare_calls.py` in one checkout and keeps every number and text of the
answers."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compare_calls import BOUNDS, Call, all_calls
from compare_data import LORA_SCALE, Data, draw
from torch import Tensor

import grpo_fast
from grpo_fast import LossConfig

Answer = dict[str, "Tensor | str"]
# `Plan.facts` is not compared: its fields are the library's own business
PLAN = ("route", "reason", "nhv", "flops", "n_chunks", "workspace_bytes", "gradient_bytes")
ROUTES = {
    "forward_only",
    "one_pass",
    "known_derivative",
    "whole_sequences",
    "frozen_head",
    "two_passes",
}
_ROOM = 50


def _token_losses() -> Callable:
    """`token_losses`, a name of the package or, before that, of a module of the same name."""
    from grpo_fast import token_losses

    found = token_losses
    return found.token_losses if isinstance(found, types.ModuleType) else found


def _function(name: str) -> Callable:
    return _token_losses() if name == "token_losses" else getattr(grpo_fast, name)


def answer(call: Call) -> Answer:
    """Loss or log-probs, metrics, per-token terms, gradients, plan and added gradient of a call;
    or the error it raised."""
    torch.manual_seed(call.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _answer(call, draw(call.seed, call.shape))
    # the boundary: the comparison reports what a checkout refuses
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def _answer(call: Call, data: Data) -> Answer:
    out: Answer = {}
    leaves = _leaves(call, data)
    keywords = _keywords(call, data, leaves)
    positional = _positional(call, data, leaves)
    function = _function(call.function)
    with (
        torch.set_grad_enabled(call.how != "no_grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=call.how == "autocast"),
    ):
        if call.function == "linear_policy_loss":
            plan = function(*positional, **keywords, explain=True)
            out |= {f"plan/{name}": repr(getattr(plan, name)) for name in PLAN}
            out["plan/str"] = str(plan)
        if call.how == "compile":
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        result = function(*positional, **keywords)
    reached = _results(call, result, out)
    if call.how != "no_grad" and any(leaf.requires_grad for leaf in leaves.values()):
        reached.backward()
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                out[f"grad/{name}"] = "None" if leaf.grad is None else leaf.grad
    if "main_grad" in keywords:
        out["main_grad"] = keywords["main_grad"]
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in out.items()}


def _leaves(call: Call, data: Data) -> dict[str, Tensor]:
    """The tensors that gradients are taken of."""
    if call.function in ("policy_loss", "logprob"):
        return {"logits": data.logits.clone().requires_grad_()}
    if call.function == "token_losses":
        return {"logp": (data.ref_logp + 0.1 * (5 * data.old_logp).sin()).requires_grad_()}
    names = ("hidden", "weight", "bias", "A", "B")
    return {n: getattr(data, n).clone().requires_grad_(n in call.trained) for n in names}


def _positional(call: Call, data: Data, leaves: dict[str, Tensor]) -> list[Tensor]:
    if call.function == "token_losses":
        return [leaves["logp"], data.advantages]
    if "logits" in leaves:
        logits = leaves["logits"]
        first = [logits * 1.0 if call.options.get("inplace") else logits]
    else:
        first = [leaves["hidden"], leaves["weight"]]
    if call.how == "strided":
        # one row more in each sequence, which the call does not see
        first[0] = torch.cat((first[0], first[0][..., -1:, :]), dim=-2)[..., :-1, :]
    with_advantages = call.function in ("linear_policy_loss", "policy_loss")
    return [*first, data.ids, *([data.advantages] if with_advantages else [])]


def _keywords(call: Call, data: Data, leaves: dict[str, Tensor]) -> dict[str, Any]:
    keywords = {}
    for name in call.given:
        if name == "lora":
            keywords[name] = (leaves["A"], leaves["B"], LORA_SCALE)
        else:
            keywords[name] = leaves[name] if name in leaves else getattr(data, name)
    if call.how == "tp":
        keywords["tp_group"] = dist.group.WORLD
    if call.config:
        keywords["config"] = LossConfig(**call.config)
    return {**keywords, **call.options}


def _results(call: Call, result: Any, out: Answer) -> Tensor:
    """Writes the fields of a result; returns what backward starts from."""
    if call.function in ("policy_loss", "linear_policy_loss"):
        loss, metrics, *tokens = result
        out["loss"] = loss
        out |= {f"metric/{name}": value for name, value in metrics.items()}
        for terms in tokens:
            out.update({f"token/{name}": value for name, value in terms._asdict().items()})
        return loss * call.upstream
    fields = {name: value for name, value in result._asdict().items() if value is not None}
    out.update(fields)
    names = ("loss",) if call.function == "token_losses" else call.outputs
    g = torch.Generator().manual_seed(call.seed + 1)
    upstream = {name: torch.randn(fields[name].shape, generator=g) for name in names}
    return sum((fields[name] * upstream[name]).sum() for name in names)


def check_realistic(calls: list[Call], answers: dict[str, Answer]) -> list[str]:
    """What is wrong with the calls themselves: refused ones, bounds that nothing or everything
    leaves, one chunk where several were meant."""
    problems = [f"{name}: {a['raised']}" for name, a in answers.items() if "raised" in a]
    for call in calls:
        got = answers[call.name]
        if "raised" in got:
            continue
        if "workspace_bytes" in call.options and got.get("plan/n_chunks") == "1":
            problems.append(f"{call.name}: one chunk")
        share = _clipped(call, got)
        if share is not None and not 0 < share < 1:
            problems.append(f"{call.name}: a share of {share:.2f} is clipped")
    return problems


def _clipped(call: Call, got: Answer) -> float | None:
    """Share of the tokens that a bound holds; None where there is none, or nobody counts them."""
    counted = call.name.startswith(("preset/", "kl/")) and "old_logp" in call.given
    if not counted or call.config["loss_type"] not in BOUNDS:
        return None
    loss_type = call.config["loss_type"]
    if loss_type.startswith("dppo"):
        # a KL gives a gradient to every token
        if call.config.get("beta"):
            return None
        return 1 - (got["metric/active_rows"] / got["metric/tokens"]).item()
    if call.function == "token_losses":
        return got["clipped"].float().mean().item()
    return got["metric/clip_ratio"].item()


def record(path: Path, match: str) -> int:
    """Make the calls whose name has `match` in it and write the answers; the number of problems,
    which are printed."""
    torch.set_num_threads(1)
    calls = [call for call in all_calls() if match in call.name]
    # a group of one rank, for tp_group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    answers = {call.name: answer(call) for call in calls}
    dist.destroy_process_group()
    torch.save(answers, path)
    problems = check_realistic(calls, answers)
    if not match:
        seen = {a.get("plan/route") for a in answers.values()}
        problems += [f"no call takes the route {r}" for r in sorted(ROUTES) if repr(r) not in seen]
    print(f"{len(calls)} calls, {sum(map(len, answers.values()))} values")
    print("".join(f"  {problem}\n" for problem in problems[:_ROOM]), end="")
    return len(problems)
