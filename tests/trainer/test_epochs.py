"""Epochs over one window: completions are dealt anew, no other ones, and resume is exact."""

from __future__ import annotations

import pytest
import torch
from tiny_ppo import RecordingPPO, config, equal, logged, trainer

from grpo_fast.models.packing import pack
from grpo_fast.trainer.epochs import DealtBatch, DealtWindow, deal

# windows of 16 completions, four micro-batches of 4, three epochs: an optimizer step each
SETTINGS = {"steps_per_generation": 4, "num_iterations": 3, "max_steps": 26}


def packed(prompts, completions):
    return pack(prompts, completions, pad_id=0, row_length=16, device="cpu")


def batch(first, lengths, **further):
    """Sequences whose tokens, and all that stands for each of them, tell where they are from."""
    prompts = [[first + s, 1] for s in range(len(lengths))]
    completions = [[10 * (first + s) + t for t in range(n)] for s, n in enumerate(lengths)]
    whole = packed(prompts, completions)
    tokens = whole.ids.float()
    return DealtBatch(packed=whole, advantages=tokens, returns=-tokens, prompts=prompts, **further)


def test_every_sequence_keeps_what_is_its():
    """With an empty completion, one of a token, and a mask that one micro-batch alone has."""
    one = batch(1, (3, 0, 2), mask=torch.tensor([True, False, True, True, False]))
    two = batch(4, (1, 4, 2))
    order = [5, 1, 3, 0, 4, 2]
    dealt = deal([one, two], order, packed)
    assert [m.packed.cu_seqlens.diff().tolist() for m in dealt] == [[2, 0, 1], [3, 4, 2]]
    assert [p for m in dealt for p in m.prompts] == [[s + 1, 1] for s in order]
    for micro in dealt:
        assert torch.equal(micro.advantages, micro.packed.ids.float())
        assert torch.equal(micro.returns, -micro.advantages) and micro.ref_logp is None
        again = packed(micro.prompts, split(micro))
        assert torch.equal(micro.packed.input_ids, again.input_ids)
        assert torch.equal(micro.packed.rows, again.rows)
    assert {int(t) for m in dealt for t in m.packed.ids[~m.mask]} == {11, 31}


def split(micro):
    lengths = micro.packed.cu_seqlens.diff().tolist()
    return [part.tolist() for part in micro.packed.ids.split(lengths)]


def test_what_is_not_of_tokens_is_refused():
    with pytest.raises(ValueError, match="^reshuffle: expected advantages"):
        one = batch(1, (3, 2))
        one.advantages = torch.zeros(2)
        deal([one, batch(3, (1, 2))], [0, 1, 2, 3], packed)
    with pytest.raises(ValueError, match="^reshuffle: expected micro-batches with their prompts"):
        one = batch(1, (3, 2))
        one.prompts = None
        deal([one], [1, 0], packed)


def window(seed="3:0", size=3):
    made = DealtWindow(DealtBatch, size, 4 * size, "cpu", pack=packed, seed=seed)
    made.fill([batch(2 * i, (1, 2)) for i in range(size)])
    return made


def epochs(made):
    """Prompts of the completions, epoch by epoch."""
    return [[p[0] for _ in range(made.size) for p in made.next().prompts] for _ in range(4)]


def test_epochs_by_seed():
    """The first is as sampled, each has every completion once, and the seed decides all."""
    seen = epochs(window())
    assert seen[0] == list(range(6)) and all(sorted(epoch) == seen[0] for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 4
    assert epochs(window()) == epochs(window()) != epochs(window("4:0"))
    alone = window(size=1)
    first = alone.next()
    assert all(alone.next() is first for _ in range(3))


def test_the_trainer_deals_them(tmp_path):
    """Each epoch of a window trains on each of its completions once, in other micro-batches, with
    the advantages, values and old log-probs that were measured once."""
    run = trainer(tmp_path, cls=RecordingPPO, **{**SETTINGS, "max_steps": 12})
    seen, stage = [], run.loss

    def loss(model, micro):
        bounds = micro.packed.cu_seqlens.tolist()
        for s, prompt in enumerate(micro.prompts):
            part = slice(bounds[s], bounds[s + 1])
            facts = (micro.advantages, micro.returns, micro.values, micro.old_logp)
            seen.append((tuple(prompt), *(tuple(f[part].tolist()) for f in facts)))
        return stage(model, micro)

    run.loss = loss
    run.train()
    parts = [seen[:16], seen[16:32], seen[32:]]
    assert len(seen) == 48 and len(run.windows) == 1
    assert sorted(parts[0]) == sorted(parts[1]) == sorted(parts[2])
    assert parts[0] != parts[1] != parts[2]
    # what was measured is what the policy says in the first epoch
    assert logged(run, "approx_kl")[0] < 1e-10 < logged(run, "approx_kl")[-1]


def test_without_it_the_order_stays(tmp_path):
    run = trainer(tmp_path, reshuffle=False, **{**SETTINGS, "max_steps": 9})
    order, stage = [], run.loss

    def loss(model, micro):
        order.append(tuple(micro.packed.ids.tolist()))
        return stage(model, micro)

    run.loss = loss
    run.train()
    assert order[:4] == order[4:8] and type(run.window).__name__ == "Window"
    with pytest.raises(ValueError, match="^reshuffle: expected a bool"):
        config(tmp_path, reshuffle="yes")


def test_resume_inside_every_epoch(tmp_path):
    """From a step in each epoch of two windows, and from the borders between them."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path, **SETTINGS, **saving)
    whole.train()
    for step in (2, 4, 6, 8, 11, 12, 16, 21):
        again = trainer(tmp_path / "again", **SETTINGS)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(whole.model.state_dict(), again.model.state_dict()), step
