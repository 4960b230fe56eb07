"""The configuration: its schema, its composition, its messages, and what makes two runs the same run."""
