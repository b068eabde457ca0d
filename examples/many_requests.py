"""Many requests at once: at most 16 under way, each answer printed as it ends, errors apart."""

import asyncio
import os

import openai

QUESTIONS = [f"What is {a} + {b}?" for a in range(1, 5) for b in range(1, 5)]


async def main() -> None:
    places = asyncio.Semaphore(16)
    async with openai.AsyncOpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    ) as client:
        model = (await client.models.list()).data[0].id

        async def ask(question: str) -> str:
            async with places:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": question}],
                    max_tokens=16,
                    temperature=0,
                )
            return f"{question} {answer.choices[0].message.content}"

        answers = await asyncio.gather(*map(ask, QUESTIONS), return_exceptions=True)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} failed: {answer}" if isinstance(answer, Exception) else answer)


asyncio.run(main())
