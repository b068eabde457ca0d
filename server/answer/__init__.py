"""From generated text to the parts of an assistant's message: reasoning, content, calls."""
