"""Train Hugging Face Transformers that would not train."""

__version__ = "0.1.0"
