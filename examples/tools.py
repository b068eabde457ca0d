"""A function that the model may call: its call is answered, and the model goes on."""

import json
import os
from typing import Any

import openai

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 40}},
                "required": ["city"],
            },
        },
    }
]


def weather(city: str) -> str:
    return f"It is sunny in {city}."


with openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
) as client:
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    # With tool_choice="required" a grammar makes the answer a call, whatever the model.
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, max_tokens=96, temperature=0
    )
    message = answer.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        result = weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        print(f"called {call.function.name}({call.function.arguments}) -> {result}")
    if message.tool_calls:
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=96)
    print(answer.choices[0].message.content)
