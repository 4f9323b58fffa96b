"""Where the objective and the engine meet: the losses, their routes, metrics and torch.compile."""

from .linear import linear_policy_loss
from .logits import policy_loss
from .vocabulary import sharded_logprob, sharded_policy_loss

__all__ = ["linear_policy_loss", "policy_loss", "sharded_logprob", "sharded_policy_loss"]
