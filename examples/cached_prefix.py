"""A long document asked about twice: the second question finds it in the prefix cache."""

import os

import openai

DOCUMENT = "The archive opens at nine. It closes at five, and on Sundays it does not open. " * 20

with openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
) as client:
    model = client.models.list().data[0].id
    for question in ("When does the archive open?", "Is it open on Sundays?"):
        answer = client.completions.create(
            model=model, prompt=f"{DOCUMENT}\n{question}\n", max_tokens=16, temperature=0
        )
        usage = answer.usage
        assert usage is not None
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details else 0
        print(f"{question} {usage.prompt_tokens} prompt tokens, {cached} from the cache")
