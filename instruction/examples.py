"""Items as tokens: the prompt that a model sees, and the response that it should give."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.tokens.tokenizer import Tokenizer
from instruction.items import Item, prompt_of
from instruction.recipe import Recipe

ANSWERED_TOKENS = 2048  # read and written at a time, which bounds memory


@dataclass(frozen=True)
class Example:
    """An item as tokens; the response ends with a document end, which a model has to learn to write."""

    item: Item
    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt + self.response


def encode_items(items: Sequence[Item], recipe: Recipe, tokenizer: Tokenizer) -> list[Example]:
    """Return the items that fit into `max_tokens` as tokens; longer ones are left out, for every model alike.

    Prompt and response are encoded apart, so that a prompt's tokens do not depend on what follows.
    """
    encode = tokenizer.encode
    examples = [
        Example(item, tuple(encode(prompt_of(item, recipe))), (*encode(item.output), tokenizer.end_of_text_id))
        for item in items
    ]
    return [example for example in examples if len(example.tokens) <= recipe.max_tokens]


def in_batches(examples: Sequence[Example], recipe: Recipe) -> Iterator[list[Example]]:
    """Yield batches of examples of similar length, the same on every call."""
    rows = max(1, ANSWERED_TOKENS // recipe.max_tokens)
    ordered = sorted(examples, key=lambda example: (len(example.prompt), example.item.key))
    for first in range(0, len(ordered), rows):
        yield ordered[first : first + rows]
