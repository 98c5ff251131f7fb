"""Transformers: an encoder and a decoder family, from scratch or from files."""
