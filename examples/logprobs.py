"""How sure the model was: each token with its probability and the runner-up."""

import math
import os

import openai

with openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
) as client:
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    for entry in (logprobs.content if logprobs else None) or []:
        others = [top.token for top in entry.top_logprobs if top.token != entry.token]
        print(f"{entry.token!r:16} {math.exp(entry.logprob):6.1%}   next: {others[:1]}")
