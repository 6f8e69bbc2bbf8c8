"""The mathematics, once: plain PyTorch forward and backward of each operation."""
