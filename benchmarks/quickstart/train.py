"""Train the quickstart model: a small OPT that reads one field out of a messy record.

    PYTHONPATH=benchmarks python -m quickstart.train [--output recipes/data/quickstart-opt] [--steps 3600] [--seed 0]

Everything is generated, nothing is downloaded. Writes a Hugging Face checkpoint in float16, and next to it
the held-out files. What makes a model this small learn to copy within minutes on a CPU:

* blanks, digits and punctuation marks are tokens of their own: a value has the same tokens wherever it is;
* position embeddings start as sinusoids: "the token before" is one linear map, not one fact a position;
* a record is read once for several questions. Each question sees the record and itself, at the positions it
  would have alone, which equals training on that many separate prompts:

      tokens     r r r r r  q q a a  q q a       r record, q question, a answer
      position   0 1 2 3 4  5 6 7 8  5 6 7
      sees       itself and what is left of it in its own group, and all r

* records are short at first and grow over the first third of the steps.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM

from quickstart.evaluate import exact_match
from quickstart.records import MAX_FIELDS, Record, Split, heldout_examples, make_record

PAD_ID, END_ID = 1, 2
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as OPT has them
MAX_POSITIONS = 512
RECORD_WEIGHT, QUESTION_WEIGHT, ANSWER_WEIGHT = 0.1, 0.02, 1.0  # of a token's loss
RECORD_GROUP = 0  # questions are groups 1, 2, ...; padding is group -1
MAX_QUESTIONS = 5  # of a record, in training
MASKED = -1e4
HELDOUT_SEED = 20_000  # fixed, so that the held-out files do not depend on --seed
NUM_PROMPTS, NUM_TEXT_LINES = 600, 1300  # the lines are about 200 KB


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tokens of a record, or of a question with its answer, which begins at index ``answer``."""

    tokens: list[int]
    position: int
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids, targets (id and weight of the next token), positions and group of each token: all [B, T]."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    groups: Tensor

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each token sees, as an additive mask [B, 1, T, T]."""
        query, key = self.groups[:, :, None], self.groups[:, None, :]
        seen = ((query == key) | (key == RECORD_GROUP)).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, MASKED)[:, None]


def main() -> None:
    """Train, report the held-out exact match now and then, save."""
    options = _parse_arguments()
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(options.seed, options.vocab_size)
    model = build_model(tokenizer.get_vocab_size(), options.hidden_size, options.layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    records = training_batches(tokenizer, options.seed, options.steps, options.batch_tokens)
    validation = list(islice(heldout_examples(options.seed + 1), 100))
    begin = time.monotonic()
    answer_loss = record_loss = 0.0
    for step, batch in enumerate(records, start=1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step, options.steps)
        answer, record = train_step(model, optimizer, batch)
        answer_loss += answer / options.report_every
        record_loss += record / options.report_every
        if step % options.report_every == 0 or step == options.steps:
            match = exact_match(model, tokenizer, validation)
            seconds = time.monotonic() - begin
            print(f"step {step} answer loss {answer_loss:.3f} record loss {record_loss:.3f} "
                  f"held-out exact match {match:.3f} seconds {seconds:.0f}", flush=True)  # fmt: skip
            answer_loss = record_loss = 0.0
            save(model, tokenizer, options.output)
    folder = options.output.parent
    write_heldout(folder / "quickstart.jsonl", folder / "quickstart_heldout.txt")


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which blanks, digits and punctuation marks never merge with their neighbours."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"->|=>|//|\p{L}+|[^\p{L}]")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(seed)
    records = [make_record(rng, Split.TRAIN) for _ in range(20_000)]
    tokenizer.train_from_iterator((record.text + record.questions[0].text for record in records), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", END_ID)]
    )
    return tokenizer


def build_model(vocab_size: int, hidden_size: int, num_layers: int) -> OPTForCausalLM:
    """A fresh OPT with heads of 32 and sinusoidal initial positions."""
    config = OPTConfig(
        vocab_size=vocab_size, max_position_embeddings=MAX_POSITIONS, num_hidden_layers=num_layers,
        hidden_size=hidden_size, word_embed_proj_dim=hidden_size, ffn_dim=4 * hidden_size,
        num_attention_heads=hidden_size // 32, dropout=0.0,
        bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    positions = model.model.decoder.embed_positions.weight  # [512 + 2, H]
    rates = torch.exp(torch.arange(0, hidden_size, 2) * (-math.log(1000.0) / hidden_size))
    angles = torch.arange(positions.shape[0])[:, None] * rates  # [512 + 2, H / 2]
    with torch.no_grad():
        positions.copy_(0.03 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


def training_batches(tokenizer: Tokenizer, seed: int, steps: int, batch_tokens: int) -> Iterator[Batch]:
    """One batch a step, of about ``batch_tokens`` tokens with padding; records grow over the first third."""
    rng = Random(seed + 2)
    for step in range(steps):
        longest = 2 + round((MAX_FIELDS - 2) * min(1.0, 3 * step / steps))
        max_fields = rng.randint(max(1, longest // 2), longest)  # alike lengths in a batch: little padding
        sequences: list[list[Group]] = []
        width = 0
        while not sequences or width * (len(sequences) + 1) < batch_tokens:
            sequences.append(_encode(tokenizer, make_record(rng, Split.TRAIN, max_fields)))
            width = max(width, sum(len(group.tokens) for group in sequences[-1]))
        yield _collate(sequences, width)


def _encode(tokenizer: Tokenizer, record: Record) -> list[Group]:
    """The record and up to ``MAX_QUESTIONS`` of its questions, each with its answer."""
    text = tokenizer.encode(record.text).ids
    groups = [Group(tokens=text, position=0, answer=len(text))]
    for question in record.questions[:MAX_QUESTIONS]:
        asked = tokenizer.encode(question.text, add_special_tokens=False).ids
        answer = tokenizer.encode(" " + question.answer, add_special_tokens=False).ids
        groups.append(Group(tokens=[*asked, *answer, END_ID], position=len(text), answer=len(asked)))
    return groups


def _collate(sequences: list[list[Group]], width: int) -> Batch:
    shape = (len(sequences), width)
    tokens, targets = torch.full(shape, PAD_ID), torch.full(shape, PAD_ID)
    positions, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    numbers = torch.full(shape, -1)
    for row, sequence in enumerate(sequences):
        begin = 0
        for number, group in enumerate(sequence):
            ids, end = torch.tensor(group.tokens), begin + len(group.tokens)
            is_record = number == RECORD_GROUP
            tokens[row, begin:end] = ids
            targets[row, begin : end - 1] = ids[1:]
            positions[row, begin:end] = torch.arange(group.position, group.position + len(ids))
            numbers[row, begin:end] = number
            weights[row, begin : end - 1] = RECORD_WEIGHT if is_record else QUESTION_WEIGHT
            weights[row, begin + group.answer - 1 : end - 1] = ANSWER_WEIGHT
            begin = end
    return Batch(tokens=tokens, targets=targets, weights=weights, positions=positions, groups=numbers)


def train_step(model: OPTForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    """One optimizer step; the mean losses of answer tokens and of record tokens, in nats."""
    mask = batch.mask(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False)
    logits = output.logits.float().flatten(0, 1)  # [B * T, V]
    losses = cross_entropy(logits, batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    is_answer, is_record = weights == ANSWER_WEIGHT, weights == RECORD_WEIGHT
    torch.autograd.backward((losses @ weights / is_answer.sum(),))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return losses[is_answer].mean().item(), losses[is_record].mean().item()


def _schedule(step: int, steps: int) -> float:
    """Warm-up over 100 steps, then a cosine down to a fiftieth."""
    return min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def save(model: OPTForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write the checkpoint in float16, without touching the model that is being trained."""
    output.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.float16)
    half.save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS, **names}
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_heldout(prompts: Path, text: Path) -> None:
    """Write held-out prompts as JSON lines, and further held-out lines for measuring perplexity."""
    examples = heldout_examples(HELDOUT_SEED)
    lines = []
    for number, (prompt, answer) in enumerate(islice(examples, NUM_PROMPTS), start=1):
        job = {"custom_id": f"rec-{number:04}", "prompt": prompt, "expected": answer}
        lines.append(json.dumps(job, ensure_ascii=False) + "\n")
    prompts.write_text("".join(lines), encoding="utf-8")
    lines = [f"{prompt} {answer}\n" for prompt, answer in islice(examples, NUM_TEXT_LINES)]
    text.write_text("".join(lines), encoding="utf-8")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the quickstart model on generated records.")
    parser.add_argument("--output", type=Path, default=Path("recipes/data/quickstart-opt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=768)
    parser.add_argument("--report-every", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    main()
