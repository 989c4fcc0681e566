"""Sessions: one actor a conversation."""
