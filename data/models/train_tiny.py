"""Train the embedded model from text that ships with CPython, and write its model card.

    python data/models/train_tiny.py [--out data/models/tiny] [--steps 2000]

The data are `pydoc_data.topics` and the docstrings of the standard library, read with `ast` (nothing is imported
or downloaded). One paragraph in twenty is held out, chosen by a hash, so it never depends on the order of files.
Most steps see 256 tokens; the last tenth sees the whole context of 1024, so that late positions are trained too.
The checkpoint with the lowest held-out loss is kept. Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import platform
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20260423
BOS, EOS = "<s>", "</s>"
HELD_OUT_ONE_IN = 20
CONTEXT = 1024
SKIP = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "pydoc_data"}


def documents() -> Iterator[str]:
    """Every language-reference topic, then every docstring of the standard library in path order."""
    yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIP & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files are deliberately not valid Python 3
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 40:
                    yield doc


def split_paragraphs() -> tuple[list[str], list[str]]:
    """Training and held-out documents; a paragraph seen before (copied docstrings) is dropped."""
    seen: set[bytes] = set()
    train, held = [], []
    for document in documents():
        kept, out = [], []
        for paragraph in document.split("\n\n"):
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            held_out = digest[0] * 256 + digest[1] < 65536 // HELD_OUT_ONE_IN
            (out if held_out else kept).append(paragraph)
        if kept:
            train.append("\n\n".join(kept))
        held.extend(out)
    return train, held


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of ids: BOS, document, EOS, BOS, ..."""
    ids = tokenizer(texts)["input_ids"]
    return torch.tensor([i for row in ids for i in [*row, tokenizer.eos_token_id]], dtype=torch.long)


def unigram_loss(train: torch.Tensor, held: torch.Tensor, vocabulary: int) -> float:
    """Cross-entropy in nats a token of add-one-smoothed training frequencies on the held-out stream."""
    counts = Counter(train.tolist())
    total = len(train) + vocabulary
    return float(np.mean([-math.log((counts[i] + 1) / total) for i in held.tolist()]))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, length: int = 256, rows: int = 16) -> float:
    model.eval()
    usable = len(stream) // length * length
    blocks = stream[:usable].view(-1, length)
    losses = [model(input_ids=b, labels=b).loss.item() for b in blocks.split(rows)]
    model.train()
    return sum(losses) / len(losses)


def train_model(args: argparse.Namespace, train: torch.Tensor, held: torch.Tensor) -> tuple[LlamaForCausalLM, dict]:
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).float()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95),
    )
    warm, best, start = 100, {"loss": math.inf, "step": 0, "state": None}, time.time()
    for step in range(args.steps):
        long = step >= args.steps * 9 // 10
        rows, length = (3, CONTEXT) if long else (12, 256)
        rate = 3e-3 * min(1.0, (step + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        at = torch.randint(0, len(train) - length, (rows,))
        batch = torch.stack([train[i : i + length] for i in at.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            held_loss = evaluate(model, held)
            print(f"step {step + 1}/{args.steps}  train {loss.item():.3f}  held-out {held_loss:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)
            if held_loss < best["loss"]:
                state = {k: v.detach().clone() for k, v in model.state_dict().items()}
                best = {"loss": held_loss, "step": step + 1, "state": state}
    model.load_state_dict(best["state"])
    model.eval()
    return model, {"held_out": best["loss"], "kept_step": best["step"], "minutes": (time.time() - start) / 60}


CARD = """\
# tiny: the model that ships with hybridlab

A Llama-architecture causal language model, small enough that one decode step is bound by launches and not by
weights, as a 7B step is on a GPU. It is here so that every command, notebook and test runs on real trained
weights without a download. Greedy text reads like Python's documentation; it knows nothing else.

| | |
|---|---|
| architecture | Llama, {layers} layers of {hidden}, {heads} query and {kv} key/value heads of {head_dim}, tied |
| parameters | {parameters:,} (float32, safetensors) |
| tokenizer | byte-level BPE, {vocabulary} entries, trained on the training text |
| context | {context} tokens |
| data | CPython {python}: `pydoc_data.topics`, library docstrings; {documents:,} texts, {train_tokens:,} tokens |
| held out | one paragraph in {one_in}, by hash: {held_tokens:,} tokens |
| training | {steps} steps of 3072 tokens (rows of 256, at last 1024), AdamW, cosine from 3e-3, seed {seed} |
| kept | step {kept_step}, the lowest held-out loss |
| **held-out loss** | **{held_out:.3f}** nats a token; unigram baseline {unigram:.3f} |
| made by | `python data/models/train_tiny.py`, {minutes:.0f} minutes on {threads} CPU core(s) |

The text is part of CPython and under the PSF License; the weights are under this repository's licence.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    texts, held_texts = split_paragraphs()
    tokenizer = train_tokenizer(texts, args.vocabulary)
    train, held = encode(tokenizer, texts), encode(tokenizer, held_texts)
    print(f"{len(texts)} documents, {len(train)} training tokens, {len(held)} held-out tokens", flush=True)

    model, report = train_model(args, train, held)
    model.generation_config.update(do_sample=False)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    config = model.config
    card = CARD.format(
        layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
        kv=config.num_key_value_heads, head_dim=config.head_dim, context=CONTEXT, vocabulary=args.vocabulary,
        parameters=sum(p.numel() for p in model.parameters()), python=platform.python_version(),
        documents=len(texts), train_tokens=len(train), held_tokens=len(held), one_in=HELD_OUT_ONE_IN,
        steps=args.steps, seed=SEED, unigram=unigram_loss(train, held, args.vocabulary),
        threads=torch.get_num_threads(), **report,
    )
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
