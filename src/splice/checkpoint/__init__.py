"""The folder on disk: its files and where they come from, its keys, its fields, its bytes. Knows no model."""
