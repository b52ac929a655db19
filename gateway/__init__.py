"""Penstock: an OpenAI-compatible gateway for self-hosted DeepSeek-V3 on SGLang."""

__version__ = "0.1.0"
