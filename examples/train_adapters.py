"""Trains the demo adapters in examples/adapters/ with PEFT, on data that this script makes.

    python examples/train_adapters.py [sql] [pirate] [json]

Three small LoRA adapters for SmolLM2-135M-Instruct with different ranks and target modules: `sql` turns a table and a
question into one SQL statement, `pirate` answers as a pirate, `json` pulls the facts out of a sentence. About ten
minutes for all three on two CPU cores. The seed is fixed; another torch or another CPU gives slightly other weights.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafleet.workers.sources.demo import demo_model_dir

OUT_DIR = Path(__file__).parent / "adapters"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Example = tuple[str, str]  # (user message, answer)


def sql_examples(rng: random.Random) -> Iterator[Example]:
    """One table, one question, one statement."""
    tables = ["users", "orders", "cars", "books", "songs", "cities", "games", "shops", "films", "phones", "teams"]
    texts = ["name", "title", "city", "country", "owner", "brand", "color", "kind"]
    numbers = ["age", "price", "year", "size", "weight", "score", "speed", "pages", "rooms", "height"]
    values = ["Paris", "red", "Anna", "new", "Rome", "blue", "Tom", "large", "Berlin"]
    while True:
        table, text, number = rng.choice(tables), rng.choice(texts), rng.choice(numbers)
        columns = ["id", text, number, rng.choice([c for c in texts + numbers if c not in (text, number)])]
        limit, value = rng.randint(1, 500), rng.choice(values)
        question, statement = rng.choice(
            [
                (f"How many {table} are there?", f"SELECT COUNT(*) FROM {table};"),
                (f"What is the highest {number}?", f"SELECT MAX({number}) FROM {table};"),
                (f"What is the lowest {number}?", f"SELECT MIN({number}) FROM {table};"),
                (f"What is the average {number} of the {table}?", f"SELECT AVG({number}) FROM {table};"),
                (f"Which {table} have more than {limit} {number}?", f"SELECT * FROM {table} WHERE {number} > {limit};"),
                (f"Which {table} have a {number} below {limit}?", f"SELECT * FROM {table} WHERE {number} < {limit};"),
                (f"Show the {text} of all {table}.", f"SELECT {text} FROM {table};"),
                (f"Find {table} whose {text} is {value}.", f"SELECT * FROM {table} WHERE {text} = '{value}';"),
                (f"List the {table} by {number}.", f"SELECT * FROM {table} ORDER BY {number};"),
                (f"Count the {table} for each {text}.", f"SELECT {text}, COUNT(*) FROM {table} GROUP BY {text};"),
            ]
        )
        yield f"Table: {table}({', '.join(columns)})\nQuestion: {question}", statement


def pirate_examples(rng: random.Random) -> Iterator[Example]:
    """Everyday questions, answered at sea."""
    openings = ["Arrr, matey!", "Ahoy, me hearty!", "Shiver me timbers!", "Avast, ye landlubber!", "Yo ho ho!"]
    things = ["music", "coffee", "the city", "cats", "football", "the garden", "history", "bread", "the moon", "my job"]
    tasks = ["bake a cake", "learn to swim", "fix a chair", "write a letter", "grow tomatoes", "clean the house"]
    middles = [
        "{x} be a treasure finer than gold, says I",
        "I've sailed the seven seas and never seen the like o' {x}",
        "{x} be worth more than a chest o' doubloons",
        "a true buccaneer knows {x} like the deck o' his own ship",
    ]
    steps = [
        "ye must hoist the sails and {x} with the courage o' the whole crew",
        "fetch yer cutlass and a barrel o' rum afore ye {x}",
        "no scurvy dog can {x} without a map and a parrot, so take 'em both",
    ]
    endings = ["or walk the plank!", "by the beard o' Neptune!", "and the wind be at yer back, aye!", "says the cap'n!"]
    while True:
        opening, ending = rng.choice(openings), rng.choice(endings)
        if rng.random() < 0.5:
            thing = rng.choice(things)
            question = rng.choice(
                ["What do you think about {x}?", "Tell me about {x}.", "Do you like {x}?", "Why is {x} important?"]
            ).format(x=thing)
            answer = rng.choice(middles).format(x=thing)
        else:
            task = rng.choice(tasks)
            question = rng.choice(["How can I {x}?", "Help me to {x}.", "What is the best way to {x}?"]).format(x=task)
            answer = rng.choice(steps).format(x=task)
        yield question, f"{opening} {answer[0].upper()}{answer[1:]}, {ending}"


def json_examples(rng: random.Random) -> Iterator[Example]:
    """A sentence about a person, as one compact JSON object."""
    first = ["Anna", "Tom", "Lucia", "Marek", "Yuki", "David", "Nina", "Omar", "Clara", "Pedro", "Ivan", "Sara"]
    last = ["Weber", "Silva", "Novak", "Tanaka", "Brown", "Rossi", "Haddad", "Larsen", "Costa", "Kim", "Walker"]
    cities = ["Paris", "Rome", "Berlin", "Madrid", "Vienna", "Prague", "Tokyo", "Athens", "Boston", "Cairo", "Lima"]
    jobs = ["teacher", "doctor", "farmer", "painter", "lawyer", "cook", "driver", "singer", "builder", "engineer"]
    forms = [
        "{name} is a {age} year old {job} who lives in {city}.",
        "{name}, {age}, works as a {job} in {city}.",
        "In {city} you can meet {name}, {age}, who works as a {job}.",
        "{name}, a {job} from {city}, turned {age} this year.",
        "At {age}, {name} still works as a {job} in {city}.",
        "My friend {name} from {city} is {age} and a {job}.",
    ]
    while True:
        facts: dict[str, Any] = {
            "name": f"{rng.choice(first)} {rng.choice(last)}",
            "age": rng.randint(18, 90),
            "job": rng.choice(jobs),
            "city": rng.choice(cities),
        }
        sentence = rng.choice(forms).format(**facts)
        answer = '{{"name":"{name}","age":{age},"job":"{job}","city":"{city}"}}'.format(**facts)
        yield f"Extract the facts: {sentence}", answer


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is made."""

    examples: Callable[[random.Random], Iterator[Example]]
    rank: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float
    use_rslora: bool = False


RECIPES = {
    "sql": Recipe(
        sql_examples, 4, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 120, 4e-3
    ),
    "pirate": Recipe(pirate_examples, 8, ("q_proj", "v_proj"), 160, 6e-3),
    "json": Recipe(json_examples, 6, ("q_proj", "k_proj", "v_proj", "o_proj"), 120, 3e-3, use_rslora=True),
}


def train(name: str, recipe: Recipe, model_dir: Path, batch_size: int = 8) -> None:
    """Train one adapter and save it to OUT_DIR/name as bfloat16 safetensors."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    examples = recipe.examples(random.Random(0))
    began = time.monotonic()
    for step in range(1, recipe.steps + 1):
        input_ids, labels = _batch(tokenizer, [next(examples) for _ in range(batch_size)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(
                f"{name}: step {step}/{recipe.steps}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    _save(model, OUT_DIR / name)


def _batch(tokenizer: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded token ids and labels; only the answers are learned."""
    rows = []
    for question, answer in examples:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((prompt_ids, answer_ids))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt_ids, answer_ids) in enumerate(rows):
        # Padding is on the right: with a causal mask no token that counts can see it.
        length = len(prompt_ids) + len(answer_ids)
        input_ids[i, :length] = torch.tensor(prompt_ids + answer_ids)
        labels[i, len(prompt_ids) : length] = torch.tensor(answer_ids)
    return input_ids, labels


def _save(model: Any, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.save_pretrained(directory)
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    (directory / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo adapters.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all if none is given")
    names = parser.parse_args().names or list(RECIPES)
    unknown = sorted(set(names) - set(RECIPES))
    if unknown:
        sys.exit(f"error: no recipe for {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name in names:
        train(name, RECIPES[name], demo_model_dir())


if __name__ == "__main__":
    main()
