"""(N, V): the only room that sees a vocabulary. Chunks of logits -> statistics -> gradients."""
