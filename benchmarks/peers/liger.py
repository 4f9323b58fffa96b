"""Other libraries as contestants: each calls the real package, imported when it is built."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.peers.peer import (
    IGNORED,
    LogitsBatch,
    Peer,
    labels,
    no_compiler,
    on_logp,
    torch_loss,
)


def _cuda_only(case: Case, level: str, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "Its kernels are Triton and need a GPU."


class _HeadOnly:
    """As much of a transformers model as TRL patches: given hidden states, and an lm_head."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.head = SimpleNamespace(weight=None, bias=None)

    def forward(self) -> None:
        """Replaced by `add_fused_lm_head`."""

    def base_model(self, hidden: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head


def _trl_fused(outputs: tuple[str, ...]) -> Callable[[Batch], Tensor]:
    from trl.trainer.utils import add_fused_lm_head

    model = _HeadOnly()
    add_fused_lm_head(model, temperature=1.0, outputs=outputs)

    def run(batch: Batch) -> Tensor:
        model.head.weight = batch.weight
        return model.forward(batch.hidden, shift_labels=labels(batch), fused_lm_head=True).log_probs

    return run


def _trl_linear(case: Case) -> Callable[[Batch], Tensor]:
    logp = _trl_fused(("log_probs", "entropy"))
    return lambda batch: torch_loss(logp(batch), batch, case)


def _trl_logprob(case: Case) -> Callable[[Batch], Tensor]:
    return _trl_fused(("log_probs",))


def _trl_logits(case: Case) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    from trl.trainer.utils import selective_log_softmax

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits[:, :-1].detach().requires_grad_()
        logp = selective_log_softmax(leaf, batch.ids, row_mask=batch.mask)
        return torch_loss(logp, batch, case), leaf

    return run


def _liger(case: Case, compiled: bool) -> Callable[[Batch], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    low, high = case.config.ratio_bounds
    loss = LigerFusedLinearGRPOLoss(
        beta=case.beta,
        compiled=compiled,
        use_ref_model=case.beta > 0,
        epsilon_low=1 - low,
        epsilon_high=high - 1,
        loss_type="dapo",
        temperature=1.0,
        use_bias_correction_kl=True,
    )

    def run(batch: Batch) -> Tensor:
        return loss(
            batch.hidden,
            batch.weight,
            batch.ids,
            batch.mask,
            batch.advantages,
            ref_per_token_logps=batch.ref_logp,
            old_per_token_logps=batch.old_logp,
        )[0]

    return run


def _liger_eager(case: Case) -> Callable[[Batch], Tensor]:
    return _liger(case, compiled=False)


def _liger_compiled(case: Case) -> Callable[[Batch], Tensor]:
    return _liger(case, compiled=True)


def _liger_tf32(case: Case) -> Callable[[Batch], Tensor]:
    loss = _liger(case, compiled=False)

    def run(batch: Batch) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        # The gradients are computed here too; backward only hands them over.
        try:
            return loss(batch)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def _liger_logits(case: Case) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    low, high = case.config.ratio_bounds

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits.detach().requires_grad_()
        loss, _ = triton_grpo_loss(
            leaf,
            batch.old_logp,
            batch.ref_logp,
            batch.ids,
            batch.advantages,
            batch.mask,
            temperature=1.0,
            beta=case.beta,
            eps_low=1 - low,
            eps_high=high - 1,
            inplace=False,
            loss_type="dapo",
            reduce=True,
            use_bias_correction_kl=True,
        )
        return loss, leaf

    return run


def _liger_grid(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.T > 65535:
        return "Its launch grid is (B, T), and CUDA's second dimension ends at 65,535."
    return _cuda_only(case, level, device)


def _liger_flce(case: Case) -> Callable[[Batch], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    nll = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="none")

    def run(batch: Batch) -> Tensor:
        flat = batch.hidden.view(-1, batch.hidden.shape[-1])
        return -nll(batch.weight, flat, labels(batch).view(-1)).view_as(batch.ids)

    return run


def _cce(**options: object) -> Callable[[Case], Callable[[Batch], Tensor]]:
    def build(case: Case) -> Callable[[Batch], Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        def run(batch: Batch) -> Tensor:
            # It drops the rows with ignored labels itself.
            return -linear_cross_entropy(
                batch.hidden,
                batch.weight,
                labels(batch),
                ignore_index=IGNORED,
                reduction="none",
                **options,
            )

        return run

    return build


def _cce_kernels(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.dtype == torch.float32:
        return "Its backward kernel takes bf16 or fp16 hidden states, and these are fp32."
    return _cuda_only(case, level, device)


def _verl(module: str) -> ModuleType:
    """verl.<module> without running verl/__init__.py, which needs ray and tensordict."""
    spec = importlib.machinery.PathFinder.find_spec("verl")
    if spec is None:
        raise ImportError("No module named 'verl'")
    folder = Path(spec.submodule_search_locations[0])
    for name, path in (("verl", folder), ("verl.utils", folder / "utils")):
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    return importlib.import_module(f"verl.{module}")


def _packed(batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, H) hidden states and (N,) ids of the unmasked tokens, as verl runs without padding."""
    index = batch.mask.view(-1).nonzero()[:, 0]
    flat = batch.hidden.view(-1, batch.hidden.shape[-1])
    return flat.index_select(0, index), batch.ids.view(-1)[index]


def _verl_torch(case: Case) -> Callable[[Batch], Tensor]:
    fused = _verl("utils.experimental.torch_functional").FusedLinearForPPO()

    def run(batch: Batch) -> Tensor:
        hidden, ids = _packed(batch)
        return fused(hidden, batch.weight, ids, temperature=1.0)[0]

    return run


def _verl_triton(case: Case) -> Callable[[Batch], Tensor]:
    linear_cross_entropy = _verl("utils.kernel.linear_cross_entropy").linear_cross_entropy

    def run(batch: Batch) -> Tensor:
        hidden, ids = _packed(batch)
        return linear_cross_entropy(hidden, batch.weight, ids, 1.0, "none")[0]

    return run


def _verl_shapes(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.H % 128:
        return f"Its kernels need a hidden size that 128 divides, and H is {case.H}."
    return _cuda_only(case, level, device)


def _fla_logits(case: Case) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    from fla.modules.grpo import fused_grpo_loss

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits.detach().requires_grad_()
        # Its kernel reads reference log-probs even where beta is 0.
        ref = torch.zeros_like(batch.ids, dtype=torch.float32)
        loss = fused_grpo_loss(
            leaf, ref, batch.ids, batch.advantages, beta=0.0, completion_mask=batch.mask
        )
        return loss.sum() / batch.mask.sum(), leaf

    return run


def _fla_limits(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.old:
        return "It is on-policy only: it has neither a ratio nor a clip."
    if device.type == "cuda" and case.beta:
        return "Its KL is not weighted by the ratio, as the KL of this case is."
    return _cuda_only(case, level, device)


def _unavailable(case: Case) -> Callable:
    raise NotImplementedError("listed with its reason only")


def _fla_scalar(case: Case, level: str, device: torch.device) -> str | None:
    return "It returns one mean or sum over all tokens, so that none can have its own advantage."


def _helion_example(case: Case, level: str, device: torch.device) -> str | None:
    return (
        "Helion's GRPO loss is an example in its repository and not in the package, and has to be"
        " autotuned for each shape first."
    )


_LIGER = "LigerFusedLinearGRPOLoss(loss_type='dapo', use_bias_correction_kl=True, chunk_size=1"

PACKAGES: tuple[Peer, ...] = (
    Peer(
        "TRL",
        "trl",
        "add_fused_lm_head (ChunkedLogProbFunction, with entropy for the loss), which drops masked"
        " rows on a GPU only, or selective_log_softmax; loss in torch",
        {"linear": _trl_linear, "logits": _trl_logits, "logprob": _trl_logprob},
    ),
    Peer("Liger", "liger-kernel", f"{_LIGER}, compiled=False)", {"linear": _liger_eager}),
    Peer(
        "Liger compiled",
        "liger-kernel",
        f"{_LIGER}, compiled=True)",
        {"linear": _liger_compiled},
        no_compiler,
    ),
    Peer(
        "Liger TF32",
        "liger-kernel",
        f"{_LIGER}, compiled=False), its fp32 products in TF32",
        {"linear": _liger_tf32},
        lambda case, level, device: (
            None if device.type == "cuda" else "TF32 is a mode of NVIDIA's tensor cores."
        ),
    ),
    Peer(
        "Liger Triton",
        "liger-kernel",
        "triton_grpo_loss(loss_type='dapo', reduce=True, inplace=False)",
        {"logits": _liger_logits},
        _liger_grid,
    ),
    Peer(
        "Liger FLCE",
        "liger-kernel",
        "LigerFusedLinearCrossEntropyLoss(reduction='none'); loss in torch",
        on_logp(_liger_flce),
        _cuda_only,
    ),
    Peer(
        "CCE",
        "cut-cross-entropy",
        "linear_cross_entropy(impl='cce', reduction='none'), its filter on; loss in torch",
        on_logp(_cce(impl="cce")),
        _cce_kernels,
    ),
    Peer(
        "CCE exact",
        "cut-cross-entropy",
        "linear_cross_entropy(impl='cce', filter_eps=None, reduction='none'); loss in torch",
        on_logp(_cce(impl="cce", filter_eps=None)),
        _cce_kernels,
    ),
    Peer(
        "CCE torch",
        "cut-cross-entropy",
        "linear_cross_entropy(impl='torch_compile', reduction='none'); loss in torch",
        on_logp(_cce(impl="torch_compile")),
        no_compiler,
    ),
    Peer(
        "verl",
        "verl",
        "FusedLinearForPPO(chunk_size=512, impl_backend='torch') without padding; loss in torch",
        on_logp(_verl_torch),
    ),
    Peer(
        "verl Triton",
        "verl",
        "linear_cross_entropy(reduction='none') without padding; loss in torch",
        on_logp(_verl_triton),
        _verl_shapes,
    ),
    Peer(
        "fla",
        "fla-core",
        "fused_grpo_loss(beta=0, inplace=False)",
        {"logits": _fla_logits},
        _fla_limits,
    ),
    Peer(
        "fla CE",
        "fla-core",
        "fused_linear_cross_entropy_loss",
        {"linear": _unavailable, "logprob": _unavailable},
        _fla_scalar,
    ),
    Peer("Helion", "helion", "examples/grpo_loss.py", {"logits": _unavailable}, _helion_example),
)
