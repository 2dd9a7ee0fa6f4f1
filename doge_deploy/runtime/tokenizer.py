"""The tokenizer of a bundle, under the name that programs know it by; it is made in `doge_deploy.text`."""

from doge_deploy.text.files import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from doge_deploy.text.streams import Detokenizer
from doge_deploy.text.tokenizer import Tokenizer

__all__ = ["CONFIG_FILE", "TEMPLATE_FILE", "TOKENIZER_FILE", "Detokenizer", "Tokenizer"]
