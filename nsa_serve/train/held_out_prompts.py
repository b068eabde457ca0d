"""Short prompts by which chat is judged. Training draws none of them, nor any that contains one."""

from __future__ import annotations

import re

HELD_OUT_PROMPTS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "What is 7 plus 5?",
    "Name three primary colors.",
    'Translate "good morning" to Spanish.',
    "What is the boiling point of water in Celsius?",
    "Write a two-line poem about the sea.",
    "What do bees make?",
    "Explain what a noun is in one sentence.",
    'Give me a synonym for "happy".',
    'What is the opposite of "cold"?',
    "List three animals that can fly.",
    "How many days are in a week?",
    "What gas do plants absorb?",
    "Who was the first president of the United States?",
    "Suggest a name for a black cat.",
    "Write a polite email asking for a day off.",
    "What is photosynthesis?",
    "Give one tip for sleeping better.",
    "What is the largest planet in the solar system?",
    'Rewrite this sentence in the past tense: "She walks to school."',
    "What does HTML stand for?",
    "Write a Python function that adds two numbers.",
    "What is the square root of 81?",
    "Name a fruit that is yellow.",
    "Why is the sky blue?",
    "What language is spoken in Brazil?",
    "Summarize in one sentence: The cat sat on the mat because it was warm and the sun was shining "
    "on it.",
    "What are the three states of matter?",
    "How do I boil an egg?",
    "Tell me a short joke.",
    "What is the currency of Japan?",
    'Correct the grammar: "He go to the market yesterday."',
    "What is a prime number?",
    "Name two continents.",
    "Who painted the Mona Lisa?",
    "Write a haiku about autumn.",
    "What is the freezing point of water in Fahrenheit?",
    "Give three ideas for a birthday gift.",
    "What does a doctor do?",
    "Is a tomato a fruit or a vegetable?",
    "What is the fastest land animal?",
    'Complete the sentence: "The early bird catches the"',
    "What is gravity?",
    "How many legs does a spider have?",
    "Name a famous scientist and say what they did.",
    "What is the main ingredient in bread?",
    "Convert 2 kilometers to meters.",
    "What should I pack for a beach trip?",
    "Hello! How are you?",
)

_WORD = re.compile(r"[a-z0-9]+")
# Words that say little of what a prompt is about.
_FILLING = frozenset(
    _WORD.findall(
        "a an and are as at by can could did do does for from give has have how i if in is it its "
        "me my name of on or please say should so tell that the their them there they this to was "
        "what when where which who why will with would write you your "
        "add calculate complete convert correct explain list plus rewrite sentence summarize "
        "translate"
    )
)


def _content(prompt: str) -> frozenset[str]:
    return frozenset(_WORD.findall(prompt.casefold())) - _FILLING


_HELD_OUT = tuple(_content(prompt) for prompt in HELD_OUT_PROMPTS)


def is_held_out(prompt: str) -> bool:
    """Whether all telling words of a held-out prompt are in ``prompt``, in any order and case."""
    words = _content(prompt)
    return any(held_out <= words for held_out in _HELD_OUT)
