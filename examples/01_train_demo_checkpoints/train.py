"""Train the two demo checkpoints, ``doge-tiny`` (dense) and ``doge-tiny-moe``, on Python's own documentation.

Everything comes from the running Python installation (``pydoc_data.topics`` and docstrings of the standard
library), so no download is needed and the corpus is the same for the same Python version.  The result is what
``DogeForCausalLM.save_pretrained`` and ``PreTrainedTokenizerFast.save_pretrained`` write::

    python train.py --output build/demo_checkpoints
    python train.py --steps 2 --output /tmp/smoke     # smoke run: a few seconds
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import shutil
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import DogeConfig, DogeForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.doge.modeling_doge import DogeAttention, DogeCDMoE, load_balancing_loss_func

VOCAB_SIZE = 1024
ROW_TOKENS = 256
CHAT_SHARE = 0.25  # of the training rows
CHAT_ROWS = 4096
TOPIC_CHAT_SHARE = 0.6  # of the questions; the others are about docstrings
SYSTEM_SHARE = 0.3  # of the conversations begin with a system prompt
MIN_ANSWER = 40  # characters
DOC_START_SHARE = 0.3  # of the text rows begin where a document begins
A_STD, A_LIMIT = 0.5, 2.0
EXPERT_RATE = 5.0  # learning rate of the experts, in terms of that of the other weights
AUX_LOSS_COEF = 0.001
PREFILL_RANGE = (4, 161)  # tokens that are mixed at the start of a row, in every other step
SMOKE_STEPS = 50  # below this many steps the report is kept short

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
EOT = "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>", EOT)

# Runs of newlines are pieces of their own, so "...<|end_header_id|>\n\n" is cut the same way with or without
# an answer behind it: a generation prompt is then an exact prefix of the rows seen in training.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)

# fmt: off
MODULES = (
    "_pydecimal", "_pyio", "argparse", "ast", "bisect", "calendar", "cmd", "codecs", "collections",
    "concurrent.futures._base", "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime",
    "difflib", "doctest", "email.message", "enum", "filecmp", "fileinput", "fnmatch", "fractions", "ftplib",
    "functools", "getopt", "gettext", "glob", "gzip", "hashlib", "heapq", "http.client", "http.cookies",
    "imaplib", "inspect", "ipaddress", "json", "json.decoder", "json.encoder", "linecache", "locale",
    "logging", "mailbox", "mimetypes", "numbers", "operator", "optparse", "os", "pathlib", "pdb", "pickle",
    "pkgutil", "platform", "plistlib", "poplib", "posixpath", "pprint", "queue", "random", "re", "reprlib",
    "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "trace", "traceback", "turtle", "types", "typing", "unittest.case", "unittest.mock",
    "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "webbrowser", "zipfile",
)
# fmt: on

HELD_OUT_TOPICS = ("objects", "raise", "subscriptions", "slicings")
HELD_OUT_MODULES = ("textwrap", "heapq", "fractions", "shelve")

TOPIC_QUESTIONS = (
    "Explain the topic '{}' of Python.",
    "What is '{}' in Python?",
    "Tell me about '{}'.",
    "How does '{}' work in Python?",
)
NAME_QUESTIONS = ("What does {} do?", "Explain {}.", "What is {}?")
SYSTEM_PROMPT = "You answer questions about Python."

SAMPLE_PROMPTS = ('The "for" statement', "Return a new", "A class definition", "string.format(")
SAMPLE_QUESTIONS = ("Explain the topic 'for' of Python.", "What is 'lambda' in Python?")


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: its directory name, what differs in the config, and how long it is trained."""

    name: str
    config: dict[str, int | bool]
    steps: int
    batch: int = 8
    learning_rate: float = 4e-3
    warmup: int = 100


RECIPES = {
    "dense": Recipe("doge-tiny", {"intermediate_size": 256}, steps=4500),
    "moe": Recipe(
        "doge-tiny-moe",
        {"intermediate_size": 192, "is_moe": True, "num_experts": 256, "num_experts_per_tok": 8},
        steps=2500,
    ),
}


# ---------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Document:
    """A text of the corpus; ``name`` is what a chat question calls it."""

    name: str
    text: str
    is_topic: bool


def topic_documents() -> list[Document]:
    """The language topics of ``pydoc``, in alphabetical order."""
    return [Document(name, text.strip(), True) for name, text in sorted(PYDOC_TOPICS.items())]


def docstrings(node: ast.AST, prefix: str) -> Iterator[Document]:
    """Yield the docstrings below ``node``, each headed by the qualified name (and arguments) it documents."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{child.name}"
        heading = name if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})"
        if text := ast.get_docstring(child):
            yield Document(name, f"{heading}\n\n{text}", False)
        yield from docstrings(child, name)


def module_documents(module: str) -> list[Document]:
    """All docstrings of a standard library module, read from its source without importing it."""
    base = Path(sysconfig.get_path("stdlib")).joinpath(*module.split("."))
    source = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
    if source is None:  # not in this Python version
        return []
    tree = ast.parse(source.read_text(encoding="utf-8"))
    own = ast.get_docstring(tree)
    return ([Document(module, f"{module}\n\n{own}", False)] if own else []) + list(docstrings(tree, module))


def drop_shared_paragraphs(documents: Sequence[Document], others: Sequence[Document]) -> list[Document]:
    """Remove from ``documents`` every paragraph that also stands in ``others`` (topics quote one another)."""
    seen = {paragraph for document in others for paragraph in document.text.split("\n\n")}
    kept = []
    for document in documents:
        text = "\n\n".join(p for p in document.text.split("\n\n") if p not in seen)
        if text:
            kept.append(Document(document.name, text, document.is_topic))
    return kept


def load_corpus() -> tuple[list[Document], list[Document]]:
    """Return (training, held-out) documents; no paragraph is in both."""
    train, held_out = [], []
    for document in topic_documents():
        (held_out if document.name in HELD_OUT_TOPICS else train).append(document)
    for module in MODULES:
        (held_out if module in HELD_OUT_MODULES else train).extend(module_documents(module))
    return train, drop_shared_paragraphs(held_out, train)


# ------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCAB_SIZE`` entries with Doge's special ids; bos is added on encode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------- data rows


@dataclass(frozen=True)
class Stream:
    """Documents as one token sequence (each ``bos text eos``) and where each of them starts."""

    tokens: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def encode(cls, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> Stream:
        """Encode and join ``documents``."""
        encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
        rows = [[*encoding.ids, tokenizer.eos_token_id] for encoding in encodings]
        lengths = torch.tensor([0, *(len(row) for row in rows)])
        return cls(torch.tensor([token for row in rows for token in row]), lengths.cumsum(0)[:-1])

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """A row that begins with bos: the start of a document, or any place behind an inserted bos."""
        offset = int(torch.randint(0, len(self.tokens) - ROW_TOKENS, (1,), generator=generator))
        if float(torch.rand(1, generator=generator)) < DOC_START_SHARE:
            offset = int(self.starts[torch.searchsorted(self.starts, offset, right=True) - 1])
            return self.tokens[offset : offset + ROW_TOKENS]
        window = self.tokens[offset : offset + ROW_TOKENS - 1]
        return functional.pad(window, (1, 0), value=SPECIAL_TOKENS.index(BOS))

    def windows(self) -> torch.Tensor:
        """The whole stream in rows of ``ROW_TOKENS`` without overlap, bos first in each."""
        body = self.tokens[: len(self.tokens) // (ROW_TOKENS - 1) * (ROW_TOKENS - 1)].view(-1, ROW_TOKENS - 1)
        return functional.pad(body, (1, 0), value=SPECIAL_TOKENS.index(BOS))


def opening(document: Document, enough: int = 220, limit: int = 360) -> str:
    """The first paragraphs of a document, without its headings, of at most ``limit`` characters."""
    paragraphs = [p for p in document.text.split("\n\n") if "****" not in p and "====" not in p]
    if not document.is_topic:  # the qualified name
        paragraphs = paragraphs[1:]
    answer = ""
    for paragraph in paragraphs:
        is_code = paragraph.startswith((" ", ">>>"))
        piece = paragraph.rstrip() if is_code else " ".join(paragraph.split())
        if answer and len(answer) + len(piece) > limit:
            break
        answer += ("\n\n" if answer else "") + piece
        if len(answer) >= enough:
            break
    if len(answer) <= limit:
        return answer.strip()
    return answer[: answer.rfind(". ", 0, limit) + 1].strip()


def question_answer(documents: Sequence[Document], generator: torch.Generator) -> tuple[str, str]:
    """Pick a document and turn it into a question and an answer."""
    document = documents[int(torch.randint(0, len(documents), (1,), generator=generator))]
    forms = TOPIC_QUESTIONS if document.is_topic else NAME_QUESTIONS
    form = forms[int(torch.randint(0, len(forms), (1,), generator=generator))]
    return form.format(document.name), opening(document)


def chat_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> torch.Tensor:
    """Conversations of several turns, rendered with the chat template and cut to ``ROW_TOKENS``."""
    answered = [document for document in documents if len(opening(document)) >= MIN_ANSWER]
    by_kind = [[document for document in answered if document.is_topic is kind] for kind in (True, False)]
    rows = []
    for _ in range(CHAT_ROWS):
        draw = torch.rand(2, generator=generator)
        messages = [{"role": "system", "content": SYSTEM_PROMPT}] if draw[0] < SYSTEM_SHARE else []
        row: list[int] = []
        while len(row) < ROW_TOKENS:
            draw = torch.rand(1, generator=generator)
            question, answer = question_answer(by_kind[int(draw[0] > TOPIC_CHAT_SHARE)], generator)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            row = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(row[:ROW_TOKENS])
    return torch.tensor(rows)


@dataclass(frozen=True)
class Data:
    """All that the training loop and the evaluation draw rows from."""

    topics: Stream
    docstrings: Stream
    chats: torch.Tensor
    held_out: torch.Tensor

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """A batch of rows: ``CHAT_SHARE`` of them chats, the others half topics and half docstrings."""
        rows = []
        for kind in torch.rand(size, generator=generator).tolist():
            if kind < CHAT_SHARE:
                rows.append(self.chats[int(torch.randint(0, len(self.chats), (1,), generator=generator))])
            else:
                stream = self.topics if kind < (1 + CHAT_SHARE) / 2 else self.docstrings
                rows.append(stream.sample(generator))
        return torch.stack(rows)


def build_data(seed: int) -> tuple[Data, PreTrainedTokenizerFast]:
    """Read the corpus, train the tokenizer on it, and encode everything."""
    train, held_out = load_corpus()
    tokenizer = train_tokenizer(train)
    data = Data(
        topics=Stream.encode([document for document in train if document.is_topic], tokenizer),
        docstrings=Stream.encode([document for document in train if not document.is_topic], tokenizer),
        chats=chat_rows(train, tokenizer, torch.Generator().manual_seed(seed)),
        held_out=Stream.encode(held_out, tokenizer).windows(),
    )
    print(
        f"corpus: {len(train)} documents; tokens: topics {len(data.topics.tokens)}, "
        f"docstrings {len(data.docstrings.tokens)}, chat rows {data.chats.numel()}, "
        f"held out {data.held_out.numel()}"
    )
    return data, tokenizer


# ----------------------------------------------------------------------------------------------------- model


def build_model(recipe: Recipe) -> DogeForCausalLM:
    """A fresh model with random ``A``: the library's zeros would leave every key with the same score."""
    config = DogeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep_window_size=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        tie_word_embeddings=True,
        hidden_act="silu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="eager",
        **recipe.config,
    )
    model = DogeForCausalLM(config)
    for module in model.modules():
        if isinstance(module, DogeAttention):
            nn.init.normal_(module.A, std=A_STD)
    model.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=[1, 5],
        pad_token_id=2,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        repetition_penalty=1.0,
        max_new_tokens=100,
    )
    return model


def split_router_logits(output: torch.Tensor, prefill: int) -> torch.Tensor:
    """Reorder router logits [B, Q, 2n] so that the model's ``view(2, N, n)`` gives each token its own halves.

    The first ``prefill`` tokens of each row are mixed as transformers mixes a call of just these tokens.
    """
    batch, length, width = output.shape
    mixed = output[:, :prefill].reshape(batch, 2, prefill, width // 2).transpose(1, 2)
    own = output[:, prefill:].reshape(batch, length - prefill, 2, width // 2)
    halves = torch.cat([mixed, own], dim=1)
    return halves.flatten(0, 1).transpose(0, 1).reshape(batch, length, width)


@contextlib.contextmanager
def per_token_routing(model: DogeForCausalLM, prefill: int = 0) -> Iterator[None]:
    """Route every token (behind the first ``prefill``) by its own logits, where transformers mixes them.

    ``DogeCDMoE`` reads ``[B, Q, 2n]`` as ``[2, N, n]`` without transposing, so with more than one token in a
    call the halves belong to other tokens.  With one token in a call both are the same: a row under
    ``prefill=p`` is routed as if it had been given to transformers as a prompt of p tokens and then token by
    token.
    """

    def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        return split_router_logits(output, prefill)

    layers = [module for module in model.modules() if isinstance(module, DogeCDMoE)]
    handles = [layer.router_gate.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------- training


def make_optimizer(
    model: DogeForCausalLM, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW (weight decay on the matrices of linear layers only) and a cosine schedule with warmup."""
    rate = recipe.learning_rate
    layers = [module for module in model.modules() if isinstance(module, DogeCDMoE)]
    experts = [table.weight for layer in layers for table in (layer.down_embed, layer.up_embed)]
    grouped = {id(p) for p in (*experts, model.model.embed_tokens.weight)}
    matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in grouped]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() <= 1)]
    groups = [
        {"params": matrices, "lr": rate, "weight_decay": 0.1},
        {"params": others, "lr": rate},
        {"params": experts, "lr": rate * EXPERT_RATE},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    warmup = min(recipe.warmup, max(1, steps // 10))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def token_loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def training_loss(model: DogeForCausalLM, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss to minimise, language model part of it); an MoE adds its layers' load balancing loss."""
    config = model.config
    outputs = model(input_ids=rows, use_cache=False, output_router_logits=config.is_moe)
    loss = token_loss(outputs.logits, rows)
    if not config.is_moe:
        return loss, loss
    keys = math.isqrt(config.num_experts)
    balance = [
        load_balancing_loss_func((logits,), config.num_experts, keys, config.num_experts_per_tok)
        for logits in outputs.router_logits
    ]
    return loss + AUX_LOSS_COEF * torch.stack(balance).mean(), loss


def train(model: DogeForCausalLM, data: Data, recipe: Recipe, steps: int, seed: int) -> list[float]:
    """Train in place and return the language model loss of every step.

    An MoE is trained in turn with per-token routing and with rows whose beginning is mixed like a prompt that
    is given to transformers in one call, so that its text is fluent under both.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = make_optimizer(model, recipe, steps)
    losses: list[float] = []
    begun = time.perf_counter()
    model.train()
    for step in range(steps):
        rows = data.batch(recipe.batch, generator)
        prefill = int(torch.randint(*PREFILL_RANGE, (1,), generator=generator)) if step % 2 else 0
        with per_token_routing(model, prefill):
            loss, lm_loss = training_loss(model, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        clamp_score_scales(model)
        losses.append(lm_loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begun
            mean = statistics.fmean(losses[-100:])
            print(f"{recipe.name} step {step + 1}/{steps}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
        if (step + 1) % 500 == 0:
            with per_token_routing(model):
                print(f"  held-out loss {held_out_loss(model, data.held_out):.3f}", flush=True)
    return losses


@torch.no_grad()
def clamp_score_scales(model: DogeForCausalLM) -> None:
    """Keep ``|A|`` moderate, so that the scores stay small enough for half precision."""
    for module in model.modules():
        if isinstance(module, DogeAttention):
            module.A.clamp_(-A_LIMIT, A_LIMIT)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def held_out_loss(model: DogeForCausalLM, rows: torch.Tensor, batch: int = 8) -> float:
    """Next-token loss over all held-out rows."""
    losses = [token_loss(model(input_ids=part, use_cache=False).logits, part) for part in rows.split(batch)]
    weights = [len(part) for part in rows.split(batch)]
    return sum(float(loss) * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


@torch.no_grad()
def decode_loss(model: DogeForCausalLM, rows: torch.Tensor, prompt: int = 64) -> float:
    """Loss of the tokens behind ``prompt`` when a row is prefilled and then decoded one token at a time."""
    losses = []
    for row in rows:
        outputs = model(input_ids=row[None, :prompt], use_cache=True)
        for position in range(prompt, ROW_TOKENS):
            token = row[position : position + 1]
            losses.append(float(functional.cross_entropy(outputs.logits[:, -1], token)))
            outputs = model(input_ids=token[None], past_key_values=outputs.past_key_values, use_cache=True)
    return statistics.fmean(losses)


@torch.no_grad()
def experts_used(model: DogeForCausalLM, rows: torch.Tensor) -> list[int]:
    """How many experts of each layer are routed to at least once on ``rows``, with per-token routing."""
    config = model.config
    keys = math.isqrt(config.num_experts)
    used = [torch.zeros(config.num_experts, dtype=torch.bool) for _ in range(config.num_hidden_layers)]
    with per_token_routing(model):
        for part in rows.split(8):
            router_logits = model(input_ids=part, use_cache=False, output_router_logits=True).router_logits
            for seen, (first, second) in zip(used, router_logits, strict=True):
                scores = (first.unsqueeze(-1) + second.unsqueeze(-2)).view(-1, keys * keys)
                seen[scores.topk(config.num_experts_per_tok, dim=-1).indices.flatten()] = True
    return [int(seen.sum()) for seen in used]


@torch.no_grad()
def loss_without_experts(model: DogeForCausalLM, rows: torch.Tensor) -> float:
    """Held-out loss with the routed experts switched off: the difference is what they contribute."""
    layers = [module for module in model.modules() if isinstance(module, DogeCDMoE)]
    saved = [layer.up_embed.weight.clone() for layer in layers]
    for layer in layers:
        layer.up_embed.weight.zero_()
    loss = held_out_loss(model, rows)
    for layer, weight in zip(layers, saved, strict=True):
        layer.up_embed.weight.copy_(weight)
    return loss


@torch.no_grad()
def greedy(model: DogeForCausalLM, tokens: list[int], length: int = 64) -> tuple[list[int], list[float]]:
    """Greedy continuation and the margin (best minus second best logit) of each of its tokens."""
    outputs = model.generate(
        torch.tensor([tokens]),
        max_new_tokens=length,
        do_sample=False,
        temperature=None,
        top_p=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].topk(2).values for logits in outputs.logits]
    return outputs.sequences[0, len(tokens) :].tolist(), [float(first - second) for first, second in best]


def show_samples(model: DogeForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    """Print greedy continuations of a few prompts and questions, and the median margin."""
    prompts = [(text, tokenizer(text)["input_ids"]) for text in SAMPLE_PROMPTS]
    for question in SAMPLE_QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append((question, tokenizer(text, add_special_tokens=False)["input_ids"]))
    margins: list[float] = []
    for text, tokens in prompts:
        new, margin = greedy(model, tokens, length)
        margins += margin
        print(f"  {text!r} -> {tokenizer.decode(new)!r}")
    print(f"  greedy margin: median {statistics.median(margins):.3f}, smallest {min(margins):.5f}")


def report(directory: Path, data: Data, smoke: bool) -> None:
    """Reload a checkpoint from disk and print its figures."""
    model = DogeForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{directory.name}: {sum(p.numel() for p in model.parameters())} parameters, {size} bytes")
    for index, layer in enumerate(model.model.layers):
        print(f"  layer {index}: A = {[round(value, 3) for value in layer.self_attn.A.tolist()]}")
    rows = data.held_out[:4] if smoke else data.held_out
    print(f"  held-out loss {held_out_loss(model, rows):.3f} (transformers' routing for an MoE)")
    if model.config.is_moe:
        with per_token_routing(model):
            print(f"  held-out loss, per-token routing: {held_out_loss(model, rows):.3f}")
        print(f"  held-out loss, experts off: {loss_without_experts(model, rows):.3f}")
        print(f"  experts used per layer: {experts_used(model, rows)} of {model.config.num_experts}")
    few = rows[:1] if smoke else rows[:: max(1, len(rows) // 8)]
    decoded = decode_loss(model, few)
    print(f"  loss of tokens 64..255 when decoded one by one ({len(few)} rows): {decoded:.3f}")
    if model.config.is_moe:
        with per_token_routing(model):
            print(f"  the same with a per-token prefill: {decode_loss(model, few):.3f}")
    show_samples(model, tokenizer, 8 if smoke else 64)


# ------------------------------------------------------------------------------------------------------ main


def save(model: DogeForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a checkpoint aside and rename it into place, so that a reader never sees half of one."""
    aside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.iterdir():
        path.chmod(0o644)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", choices=[*RECIPES, "both"], default="both", help="which one to train")
    parser.add_argument("--steps", type=int, help=f"training steps of each (default: {default_steps()})")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo_checkpoints"), help="folder for the checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(arguments)


def default_steps() -> str:
    """The step counts of the recipes, for the help text."""
    return ", ".join(f"{recipe.steps} {name}" for name, recipe in RECIPES.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save and check the requested checkpoints."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    data, tokenizer = build_data(options.seed)
    for kind in RECIPES if options.model == "both" else [options.model]:
        recipe = RECIPES[kind]
        steps = recipe.steps if options.steps is None else options.steps
        torch.manual_seed(options.seed)
        model = build_model(recipe)
        train(model, data, recipe, steps, options.seed)
        save(model, tokenizer, options.output / recipe.name)
        report(options.output / recipe.name, data, smoke=steps < SMOKE_STEPS)


if __name__ == "__main__":
    main()
