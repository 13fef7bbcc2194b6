"""Text: sources, documents, cached token ids, and the windows that a model is trained on."""
