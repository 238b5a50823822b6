"""Text on its way to the model and back: tokenizer, streaming, chat format, stop ids, tool calls."""

from refgemma.text.chat import encode_chat, render
from refgemma.text.streaming import StreamDecoder, read_generation_config, stop_ids
from refgemma.text.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "encode_chat", "read_generation_config", "render", "stop_ids"]
