"""The model card: the facts of a run that it may show, and its Markdown."""
