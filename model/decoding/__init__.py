"""From logits to tokens: steps, sampling, log-probabilities, grammars."""
