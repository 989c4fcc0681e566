"""What the fronts for asyncio and for threads stand on."""
