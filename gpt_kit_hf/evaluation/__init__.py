"""Evaluation of a model.

`metrics` computes loss, perplexity and bits per byte, and baselines; `windows` cuts the text for it. `score` scores
text or instruction rows and writes the report that `gpt-kit evaluate` prints; `lm_eval` runs tasks of
lm-evaluation-harness, and `invariance` checks that padding, packing, caches, attention implementations and precisions
give the same logits.

What a model believes at each token: `token_scores` computes probabilities, ranks, entropies and sampling from logits,
`text_reader` reads a text that changes without starting again, `attention_maps` returns the weights of attention,
`logit_lens` what each layer would say, and `text_comparison` aligns two models on one text. `held_out` finds the
text that a run was evaluated on, and `passages` scores parts of a text by token.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention_maps": ["attention_weights"],
        "invariance": ["check_invariance"],
        "logit_lens": ["LogitLens"],
        "metrics": ["Evaluation", "evaluate_stream"],
        "score": ["ScoreReport", "score_model"],
        "token_scores": ["sampling_distribution", "score_tokens"],
    },
)
