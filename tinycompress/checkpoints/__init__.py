"""Folders and files to a graph and back: Hugging Face, GGUF, and the packed layouts of other tools."""
