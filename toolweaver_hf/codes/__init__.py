"""Structured tokenization: from documents to codes (ToolWeaver, section 3.1)."""
