"""The process that a run lives in: launch checks, signals, torch.compile, memory."""
