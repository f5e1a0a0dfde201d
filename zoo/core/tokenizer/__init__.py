"""From text to token ids, with special tokens and chat templates."""
