"""The Gemma 3 decoder over packed weights: layers, KV cache, LoRA, sampling."""
