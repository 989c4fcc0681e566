"""Turns: their requests, rounds, journals and streams, and what users put around them."""
