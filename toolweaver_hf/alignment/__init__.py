"""Generative alignment: a language model learns the codes (ToolWeaver, section 3.2)."""
