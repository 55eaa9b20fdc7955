"""To the Hub: folders that a step has made, each with its code and its card."""
