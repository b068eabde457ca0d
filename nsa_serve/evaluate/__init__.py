"""What a model can do: needles, perplexity, retrieval tasks; over HTTP or in this process."""
