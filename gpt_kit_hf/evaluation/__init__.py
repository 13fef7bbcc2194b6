"""Evaluation of a model.

`metrics` computes loss, perplexity and bits per byte, and baselines; `windows` cuts the text for it. `score` scores
text or instruction rows for `gpt-kit evaluate`, `lm_eval` runs tasks of lm-evaluation-harness, and `invariance`
checks that padding, packing, caches, attention implementations and precisions give the same logits.
"""
