"""Texts around an edit: what is put before its prompt, and prompts that have nothing to do with it."""

from __future__ import annotations

from typing import Any

import torch

from clkit.modes import evaluating

# The published code's seeds, each continued by 5 and by 10 tokens.
SEEDS = ("I", "You", "Because", "Yes", "Q: ")
LENGTHS = (5, 10)

# For edits that name no irrelevant prompt, and as further ones.
IRRELEVANT = (
    "How do I boil an egg?",
    "What is the sum of three and four?",
    "Name a colour that is mixed from blue and yellow.",
    "Why is the sky blue?",
    "What does a thermometer measure?",
    "Who wrote the play Hamlet?",
    "Which planet is closest to the sun?",
    "How many days are there in a week?",
    "Give me a synonym for happy.",
    "What language do people speak in Brazil?",
    "The chemical symbol of gold is",
    "Write a short greeting to a friend.",
    "when does the next season of the show start",
    "In which year did the first person walk on the moon?",
    "What is the largest ocean on Earth?",
    "who sings the song that plays at the end",
    "Who painted the Mona Lisa?",
    "Who was the first president of the United States?",
    "Who is the author of Don Quixote?",
    "Who founded the company that makes the iPhone?",
    "Where was Marie Curie born?",
    "Where is the Great Barrier Reef?",
    "Where did tea come from?",
    "When did the Second World War end?",
    "What year was the Eiffel Tower built?",
    "What is the capital of Canada?",
    "What country is Nairobi in?",
    "What is the name of Shakespeare's wife?",
    "What family do cats belong to?",
    "What is the occupation of Serena Williams?",
    "What team did Pele play for?",
    "Which company made the Walkman?",
    "Which university did Alan Turing attend?",
    "Which river flows through London?",
    "Which band recorded Yellow Submarine?",
    "The mother tongue of Victor Hugo is",
    "The currency of Japan is",
    "The director of Jaws is",
    "Bach was born in the city of",
    "how many people live in new york city",
    "what does the name of the month march mean",
    "who won the last world cup",
    "where was the movie filmed",
    "when was the first phone made",
    "Translate good morning into French.",
    "Explain what a contract is.",
    "Can you recommend a book for children?",
    "Complete the sentence: the early bird",
)


@torch.no_grad()
def written(lm: Any, tokenizer: Any, device: torch.device, count: int) -> list[str]:
    """The first ``count`` of ten short texts that the model writes itself, greedily."""
    import transformers

    settings_class: Any = transformers.GenerationConfig  # untyped
    texts: list[str] = []
    own = lm.generation_config
    lm.generation_config = settings_class()
    try:
        with evaluating(lm):
            for length in LENGTHS:
                for seed in SEEDS:
                    if len(texts) < count:
                        ids = tokenizer(seed, return_tensors="pt").input_ids.to(device)
                        settings = settings_class(
                            max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id
                        )
                        out = lm.generate(
                            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
                        )
                        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    finally:
        lm.generation_config = own
    return texts
