"""Texts: tokenizers, what clients may ask for, text out of tokens, workloads of texts."""
