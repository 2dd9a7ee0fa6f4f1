"""Text to ids and back, with what a bundle holds: neither torch nor transformers is imported.

files.py      which of a tokenizer's files says what
tokenizer.py  `Tokenizer`: text and conversations to ids
templates.py  chat templates, in a sandbox with limits
streams.py    `Detokenizer`: ids to text as they come
literals.py   texts of special tokens that somebody typed, kept as text
backend.py    calls of the library during which other threads run
longest.py    how much text one token may stand for
lengths.py    what is said of texts that are too long
"""
