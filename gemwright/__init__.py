"""gemwright plans, runs, fine-tunes, checks, exports and serves Google's Gemma 3 on the machine its user owns."""

__version__ = "0.1.0"
