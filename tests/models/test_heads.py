"""The check of a head where the layers below it cannot run."""

import pytest
from tiny import TRANSFORMS, tiny

from grpo_fast.models.head import Head, check_head, find_head


@pytest.mark.parametrize("family", TRANSFORMS)
def test_the_head_can_be_checked_without_its_layers(family):
    model = tiny(family)
    body = model.base_model

    def layers(*args, **kwargs):
        raise RuntimeError("a layer ran")

    body.forward = layers
    check_head(model, find_head(model), run_backbone=False)
    assert body.forward is layers
    del body.forward
    check_head(model, find_head(model), run_backbone=False)
    assert "forward" not in body.__dict__
    if TRANSFORMS[family] != (None, 1.0):
        with pytest.raises(ValueError, match="its head does something unknown"):
            check_head(model, Head(find_head(model).weight), run_backbone=False)
