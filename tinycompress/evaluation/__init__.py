"""What a model is worth: perplexity, divergence, intervals, long contexts, tables."""
