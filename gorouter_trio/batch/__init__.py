"""Batches: rows in, a bounded number in flight, results as they complete."""
