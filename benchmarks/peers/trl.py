"""TRL: the log-probs of its trainer, over a loss in torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.peers.peer import LogitsBatch, Peer, labels, torch_loss


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


CONTESTANTS: tuple[Peer, ...] = (
    Peer(
        "TRL",
        "trl",
        "add_fused_lm_head (ChunkedLogProbFunction, with entropy for the loss), which drops masked"
        " rows on a GPU only, or selective_log_softmax; loss in torch",
        {"linear": _trl_linear, "logits": _trl_logits, "logprob": _trl_logprob},
    ),
)
