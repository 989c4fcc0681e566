"""The shared worker pool: connections, retries and replies."""
