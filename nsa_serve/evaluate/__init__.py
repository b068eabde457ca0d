"""What a model can do: needles, perplexity, retrieval tasks, chat; over HTTP or in this process."""
