"""Evaluation of a model: loss, perplexity and bits per byte of text or answers, lm-evaluation-harness, invariance."""
