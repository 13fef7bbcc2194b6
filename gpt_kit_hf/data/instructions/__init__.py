"""Instruction rows: reading, encoding with a loss mask, packing, and the supervision report."""
