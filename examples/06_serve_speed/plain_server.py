"""transformers behind the plainest web server: one request at a time, its pieces as server-sent events.

python plain_server.py CHECKPOINT PORT THREADS

What the servers that come with small models do: `generate` in a thread, a streamer that hands its text to the response,
and a lock, because the model is one.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

CHECKPOINT, PORT, THREADS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

torch.set_num_threads(THREADS)
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
app, turn = FastAPI(), threading.Lock()


@app.get("/health")
def health() -> dict[str, str]:
    """The server answers."""
    return {"status": "ok"}


@app.post("/v1/completions")
def completions(body: dict[str, Any]) -> StreamingResponse:
    """A greedy completion of exactly `max_tokens` tokens."""

    def pieces() -> Iterator[str]:
        with turn:
            inputs = tokenizer(body["prompt"], return_tensors="pt")
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
            length = body["max_tokens"]
            options = {**inputs, "streamer": streamer, "max_new_tokens": length, "min_new_tokens": length}
            thread = threading.Thread(target=model.generate, kwargs={**options, "do_sample": False})
            thread.start()
            for text in streamer:
                yield _event(text, None)
            thread.join()
        yield _event("", "length")
        yield "data: [DONE]\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


def _event(text: str, reason: str | None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]}, separators=(',', ':'))}\n\n"


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")
