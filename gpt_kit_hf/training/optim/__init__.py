"""Optimizers and learning-rate schedules: AdamW, Muon, parameter groups."""
