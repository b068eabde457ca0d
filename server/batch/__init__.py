"""Batch files in OpenAI's form: a request a line in, an answer a line out."""
