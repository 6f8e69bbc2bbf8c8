"""Tokenizer, chat template and loss mask."""
