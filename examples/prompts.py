"""Prompts for the demo model and its adapters: what the README, the tests and the benchmarks ask."""

from __future__ import annotations

SQL_PROMPTS = (
    "Table: planets(id, name, radius, moons)\nQuestion: Which planets have more than 3 moons?",
    "Table: recipes(id, title, minutes, author)\nQuestion: How many recipes are there?",
    "Table: trains(id, city, speed, price)\nQuestion: What is the highest price?",
)
PIRATE_PROMPTS = (
    "What do you think about the weather today?",
    "How can I make a good soup?",
    "Tell me about your favourite book.",
)
JSON_PROMPTS = (
    "Extract the facts: Olga Petrov is a 41 year old baker who lives in Lisbon.",
    "Extract the facts: In Oslo you can meet Hugo Lindgren, 29, who works as a pilot.",
    "Extract the facts: Mary Stone, a nurse from Dublin, turned 53 this year.",
)
PLAIN_PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to five.",
)
