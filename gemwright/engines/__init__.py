"""One protocol over what generates and scores: llama.cpp, our PyTorch model, a scripted fake."""
