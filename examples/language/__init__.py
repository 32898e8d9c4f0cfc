"""The text and the tokens of the language example."""
