"""GGUF and safetensors in and out, one name table, finding and verifying models."""
