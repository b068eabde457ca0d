"""Growing a dense checkpoint into an NSA model: corpus, retrieval tasks, losses, the loop."""
