"""The data plane: an OpenAI-compatible gateway in front of the workers."""
