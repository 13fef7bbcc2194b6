"""The options of every command, each declared once."""
