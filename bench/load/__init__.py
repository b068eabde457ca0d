"""Load tests of any server with OpenAI's API: what is sent, when, and what came back when."""
