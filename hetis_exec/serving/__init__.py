"""Texts in and out: tokenizers, stop conditions, an engine for requests that come at any time, a server."""
