"""The optimizer of a run.

`optimizer` creates AdamW or Muon for a model and computes the learning rate of each step; `muon` holds the combined
Muon and AdamW optimizer and the orthogonalisation of its updates.
"""
