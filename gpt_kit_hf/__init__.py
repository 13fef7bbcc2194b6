"""A GPT of one's own, from raw text to a published model."""
