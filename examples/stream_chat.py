"""A streamed chat answer: text as it comes, then its usage and the time to its first token."""

import os
import time

import openai

with openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
) as client:
    model = client.models.list().data[0].id
    start = time.perf_counter()
    first = None
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            print(f"\n\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")
    if first is not None:
        print(f"first token after {first:.3f} s")
