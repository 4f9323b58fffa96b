"""The fields of `GRPOConfig` that describe which tokens a forward computes."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_fast.checks import fail

from .kl import option as _option

_SHARE = {"auto": "auto", "true": True, "false": False}


@dataclass
class ForwardOptions:
    """Tokens that the old, the reference and the training pass need not compute."""

    share_prompts: str = _option(
        "auto",
        "Compute a prompt once for all completions of its group in a micro-batch: 'auto' where the "
        "model can and it saves a sixteenth of the tokens, True refuses a model that cannot.",
    )
    skip_inactive_completions: bool = _option(
        True,
        "Leave completions of advantage 0 out of the forward where neither a KL nor an entropy "
        "bonus needs them; metrics of the loss are then means over the others.",
    )

    def check_forward(self) -> None:
        """Refuse unknown values; the words of a command line become what they mean.

        Raises:
            ValueError: naming the option.
        """
        given = self.share_prompts
        self.share_prompts = _SHARE.get(str(given).lower(), given)
        if not isinstance(self.share_prompts, bool) and self.share_prompts != "auto":
            fail("share_prompts", "'auto', True or False", repr(given))
        if not isinstance(self.skip_inactive_completions, bool):
            got = repr(self.skip_inactive_completions)
            fail("skip_inactive_completions", "True or False", got)
