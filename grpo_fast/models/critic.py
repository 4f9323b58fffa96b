"""Critics: the value (N,) of each completion token, read at the row that predicts it.

    V = w . h + b        h (N, H) in float32, under no autocast

h are the policy's own hidden states (`shared`: one forward for both), or those of a backbone of the
critic's own (`separate`). A critic is a submodule `critic` of the innermost policy, so that DDP,
optimizer and accumulation see one model; it is saved beside the policy and never inside it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from grpo_fast.checks import fail

from .head import backbone, evaluating, innermost
from .packing import PackedBatch, pack

NAME = "critic"
CRITICS = ("shared", "separate")
_FILE, _FACTS = "critic.safetensors", "critic.json"


class Critic(nn.Module):
    """A linear head in float32, which starts at 0 everywhere, over hidden states.

    Args:
        width: H of the hidden states.
        body: its own backbone; None: it reads the policy's hidden states.
        detach: keep its gradient out of the policy's backbone.
    """

    def __init__(self, width: int, body: nn.Module | None = None, detach: bool = False) -> None:
        super().__init__()
        self.body, self.detach = body, detach
        self.head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        """Values (N,) float32 of the completion tokens.

        Args:
            batch: the packed sequences.
            hidden: (N, H) of the policy at the rows of the tokens; a critic with a backbone of its
                own does not look at them.
        """
        if self.body is not None:
            hidden = batch.select(self.body(**batch.inputs())[0])
        elif self.detach:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)


def shared_critic(policy: nn.Module, detach: bool, source: str | None = None) -> Critic:
    """A critic on the hidden states of a policy.

    Args:
        source: folder that `save_critic` wrote, to start from; see `check_source`.
    """
    critic = Critic(width_of(backbone(policy).config), detach=detach)
    if source is not None:
        load_critic(critic, Path(source), "critic_model")
    return critic


def separate_critic(
    policy: nn.Module,
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    **init_kwargs: Any,
) -> Critic:
    """A critic with a backbone of its own.

    Args:
        policy: without an adapter where `source` is None.
        source: checkpoint name or folder; of a reward model (sequence classification with one
            label) the score becomes the value head. Or a folder that `save_critic` wrote. None: a
            copy of the policy's backbone.
        tokenizer: the policy's.
        init_kwargs: passed to `from_pretrained`; `dtype` is float32 unless given.

    Raises:
        ValueError: the checkpoint has another tokenizer, more than one label, or cannot be packed.
    """
    if source is None:
        body = copy.deepcopy(backbone(policy)).requires_grad_()
        return Critic(width_of(body.config), body)
    check_source(source, tokenizer, "separate")
    init_kwargs.setdefault("dtype", torch.float32)
    if is_saved_critic(source):
        body = AutoModel.from_config(AutoConfig.from_pretrained(source), **init_kwargs)
        critic = Critic(width_of(body.config), body)
        load_critic(critic, Path(source), "critic_model")
    elif not _is_reward_model(source):
        body = AutoModel.from_pretrained(source, **init_kwargs)
        critic = Critic(width_of(body.config), body)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, **init_kwargs)
        if not isinstance(getattr(model, "score", None), nn.Linear):
            fail("critic_model", "a decoder with a linear score", type(model).__name__)
        critic = Critic(width_of(model.base_model.config), model.base_model)
        with torch.no_grad():
            critic.head.weight.copy_(model.score.weight)
            if model.score.bias is not None:
                critic.head.bias.copy_(model.score.bias)
    check_critic_packing(critic, tokenizer.pad_token_id)
    return critic


def width_of(config: Any) -> int:
    """H of the hidden states of a model with this configuration."""
    return config.get_text_config(decoder=True).hidden_size


def _is_reward_model(source: str) -> bool:
    names = AutoConfig.from_pretrained(source).architectures or [""]
    return names[0].endswith("ForSequenceClassification")


def is_saved_critic(source: str) -> bool:
    """Whether `save_critic` wrote this folder."""
    return (Path(source) / _FACTS).is_file() and (Path(source) / _FILE).is_file()


def check_source(
    source: str, tokenizer: PreTrainedTokenizerBase, kind: str, width: int | None = None
) -> None:
    """Refuse a checkpoint that the policy has no use for as a critic, before anything is loaded.

    Args:
        source: checkpoint name or folder, or a folder that `save_critic` wrote.
        tokenizer: the policy's.
        kind: of the critic, one of `CRITICS`.
        width: H of the policy's hidden states; needed where the critic reads them.

    Raises:
        ValueError: it has no tokenizer or another vocabulary, more than one label, fewer embeddings
            than there are tokens; a saved critic is of the other kind, or of another width.
    """
    if is_saved_critic(source):
        facts = json.loads((Path(source) / _FACTS).read_text(encoding="utf-8"))
        if facts["kind"] != kind:
            fail("critic_model", f"a critic of the kind {kind!r}", f"{facts['kind']!r} in {source}")
        if facts["vocabulary"] != _vocabulary(tokenizer):
            fail("critic_model", "the tokenizer of the policy", f"a critic of another in {source}")
        if width is not None and facts["width"] != width:
            expected = f"a critic on the {width} hidden states of the policy"
            fail("critic_model", expected, f"one on {facts['width']} in {source}")
        return
    if kind == "shared":
        fail("critic_model", "the folder of a saved critic with critic='shared'", repr(source))
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        # transformers says in a paragraph what a checkpoint may be
        fail("critic_model", "a checkpoint that can be read", f"{source} ({error})")
    if _is_reward_model(source) and config.num_labels != 1:
        fail("critic_model", "a reward model with one label", f"{config.num_labels} of {source}")
    try:
        theirs = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        # whatever its files lack, there is nothing to compare with
        hint = "save the policy's tokenizer beside it if it was trained with it"
        fail("critic_model", "a checkpoint with its tokenizer", f"{source} ({error})", hint)
    if theirs.get_vocab() != tokenizer.get_vocab():
        other = sum(theirs.get_vocab().get(t) != i for t, i in tokenizer.get_vocab().items())
        got = f"{source}, where {other} of {len(tokenizer)} tokens are others"
        fail("critic_model", "the tokenizer of the policy", got)
    rows = config.get_text_config(decoder=True).vocab_size
    if rows < len(tokenizer):
        expected = f"an embedding for each of the {len(tokenizer)} tokens of the policy"
        fail("critic_model", expected, f"{rows} in {source}")


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all tokens with their numbers."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_critic_packing(critic: Critic, pad_id: int) -> None:
    """Refuse a backbone that cannot hold several sequences in a row: see `check_packing`.

    Raises:
        ValueError: its hidden states depend on what else is in the row.
    """
    body = critic.body
    vocab = body.get_input_embeddings().num_embeddings
    tokens = [(5 + 3 * i) % vocab for i in range(24)]
    prompts = [tokens[0:4], tokens[4:6], tokens[6:11]]
    completions = [tokens[11:14], tokens[14:20], tokens[20:24]]
    options = {"pad_id": pad_id, "row_length": None, "device": body.device}

    def hidden(batch: PackedBatch) -> Tensor:
        return batch.select(body(**batch.inputs())[0]).float()

    with torch.no_grad(), evaluating(body):
        together = hidden(pack(prompts, completions, **options))
        pairs = zip(prompts, completions, strict=True)
        alone = torch.cat([hidden(pack([p], [c], **options)) for p, c in pairs])
    error = ((together - alone).abs().max() / alone.abs().max()).item()
    allowed = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(body.dtype, 2e-3)
    if not error <= allowed:
        got = f"{type(body).__name__}, whose hidden states differ by {error:.3g} of the largest"
        fail("critic_model", "a backbone that can be packed", got)


def add_critic(policy: nn.Module, critic: Critic) -> Critic:
    """Make a critic a submodule of the innermost policy, on its device.

    Raises:
        ValueError: there is one already.
    """
    lm = innermost(policy)
    if hasattr(lm, NAME):
        fail("model", f"a policy without an attribute {NAME!r}", type(getattr(lm, NAME)).__name__)
    setattr(lm, NAME, critic.to(lm.device))
    return critic


def without_critic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a policy without those of its critic, whatever wraps the policy."""
    return {name: value for name, value in state.items() if NAME not in name.split(".")[:-1]}


def save_critic(critic: Critic, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a critic into a folder of its own: its weights, and what it belongs to.

    Args:
        tokenizer: the policy's; a hash of its vocabulary is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # copies: a tied weight is one storage under two names, which safetensors refuses
    state = {k: v.detach().cpu().contiguous().clone() for k, v in critic.state_dict().items()}
    save_file(state, folder / _FILE)
    if critic.body is not None:
        critic.body.config.save_pretrained(folder)
    facts = {
        "kind": "shared" if critic.body is None else "separate",
        "width": critic.head.in_features,
        "vocabulary": _vocabulary(tokenizer),
    }
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def load_critic(critic: Critic, folder: Path, name: str = "resume_from_checkpoint") -> None:
    """Read the weights that `save_critic` wrote.

    Args:
        name: of the argument that the folder comes from.

    Raises:
        ValueError: there are none, or they are those of another critic.
    """
    path = folder / _FILE
    if not path.is_file():
        fail(name, f"a critic in {folder}", "no such file")
    state, own = load_file(path), critic.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: tuple(value.shape) for key, value in own.items()}
    if shapes != expected:
        differing = sorted(n for n in shapes | expected if shapes.get(n) != expected.get(n))
        got = ", ".join(f"{n} {shapes.get(n)} for {expected.get(n)}" for n in differing[:3])
        fail(name, f"the critic of this run in {folder}", got)
    critic.load_state_dict(state)
