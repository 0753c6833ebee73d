"""Energy-Based Fine-Tuning of language models on Megatron-Core."""

__version__ = "0.1.0"
