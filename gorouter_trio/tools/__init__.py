"""Tools: what they are, and the supervisor that runs what a model asks for."""
