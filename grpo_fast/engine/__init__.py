"""(N, V): the only room that sees a vocabulary. Chunks of logits -> statistics -> gradients."""

# for what torch.compile finds in its table
from . import compiled as compiled
