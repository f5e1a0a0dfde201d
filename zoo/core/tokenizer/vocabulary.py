"""Whether a model has a row for every token of a tokenizer."""

from __future__ import annotations

from zoo.core.errors import UsageError
from zoo.core.tokenizer.tokenizer import Tokenizer

_SHOWN = 3


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raise UsageError naming the tokens beyond the `rows` of a model's embedding.

    Rows beyond the tokens are fine: many models have some, so that their number can be divided.
    """
    size = tokenizer.vocab_size
    if size <= rows:
        return
    beyond = ", ".join(f"{tokenizer.decode([id])!r:.40} is {id}" for id in range(rows, min(size, rows + _SHOWN)))
    raise UsageError(
        f"the tokenizer in {tokenizer.path} has {size} tokens and the model only {rows} ({beyond}"
        f"{' and so on' if size > rows + _SHOWN else ''}); --from must name a directory whose tokenizer belongs to its "
        f"weights, or give the model more rows first: transformers' model.resize_token_embeddings({size})"
    )
