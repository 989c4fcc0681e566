"""The network: HTTP/1.1 by trio and httptools, its httpx face, and in-memory streams."""
