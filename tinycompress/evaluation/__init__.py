"""What a model is worth: perplexity, agreement, intervals, long contexts, tables."""
