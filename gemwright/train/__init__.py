"""Supervised fine-tuning with LoRA over packed weights."""
