"""Train a checkpoint on text; start it again with the same arguments to go on where it stopped.

    python -m model.training.train --out runs/tales --train tales.txt --valid held_out.txt

Truncated backpropagation through time: each lane of the batch reads a document in consecutive
chunks, and its latent state is carried from one to the next without its gradient.
"""

import dataclasses
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from model.files import append_line
from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level
from model.text.tokenizer import Tokenizer
from model.training.corpus import IGNORED, Lanes, read_documents
from model.training.evaluate import bits_per_byte
from model.training.muon import Muon
from model.training.requests import CHAT_TEMPLATE

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
LINES_TEMPLATE = """\
{#- Stories, not a dialogue, are what this model has read: messages follow each other as lines. -#}
{%- for message in messages -%}
{{ message.content + "\\n" }}
{%- endfor -%}
"""
MAX_WARMUP_TOKENS = 100_000
TRAIN_STATE = "train_state.pt"
CURVE = "training.jsonl"
"""A line per saved state: tokens, and bits per byte of held-out text."""

MOST_SKIPPED = 10
"""Steps in a row without finite gradients."""

ENCODE_BATCH = 64
"""Texts: what the tokenizer returns takes far more memory than its token ids."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the training: linear warm-up, then a half cosine down to a share of it.

    A training that begins with tokens that its weights have seen warms up too, to where the cosine
    is then: its optimizer knows nothing.
    """

    peak: float
    warmup_tokens: int
    total_tokens: int
    start_tokens: int = 0
    final_share: float = 0.1

    def learning_rate(self, tokens: int, time_share: float = 0.0) -> float:
        """At the step that begins after this many tokens, and this share of the time there is."""
        warm = min(1.0, (tokens - self.start_tokens + 1) / max(1, self.warmup_tokens))
        falling = self.total_tokens - self.warmup_tokens
        done = max(0, tokens - self.warmup_tokens) / max(1, falling)
        left = 0.5 + 0.5 * math.cos(math.pi * min(max(done, time_share), 1.0))
        return self.peak * warm * (self.final_share + (1 - self.final_share) * left)


@dataclass(frozen=True)
class Recipe:
    """What must stay the same when a training is taken up again."""

    train: tuple[str, ...]
    tokens: int
    lanes: int
    chunk_tokens: int
    document_tokens: int
    learning_rate: float
    weight_decay: float
    seed: int
    start_tokens: int = 0
    train_characters: int | None = None
    joined_tokens: int = 0
    hours: float | None = None
    final_share: float = 0.1


class Trainer:
    """A network, its optimizer, and where the lanes and their latent states stand."""

    def __init__(
        self,
        network: LanguageModel,
        documents: list[Tensor],
        recipe: Recipe,
        *,
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        """`bf16`: matrix products outside of the attention run in bfloat16, the optimizer's too.

        `compiled`: for chunks of full length alone, to which shorter ones are padded.
        """
        if compiled:
            for part in (network.embed_pos, *network.blocks):
                part.compile(dynamic=False)
        self._least_tokens = recipe.chunk_tokens if compiled else 0
        self.network = network
        self._bf16 = bf16
        self.recipe = recipe
        self.lanes = Lanes(documents, recipe.lanes, recipe.chunk_tokens, recipe.seed)
        warmup = min(MAX_WARMUP_TOKENS, recipe.tokens // 50)
        self.schedule = Schedule(
            recipe.learning_rate, warmup, recipe.tokens, recipe.start_tokens, recipe.final_share
        )
        self.optimizers = new_optimizers(network, recipe.weight_decay, bf16=bf16)
        self.tokens = recipe.start_tokens
        self.elapsed_s = 0.0
        """That steps took."""
        self.num_skipped = 0
        """Steps in a row that changed no weight, up to now."""
        self._fresh = network.empty_state(recipe.lanes)
        self._state = self._fresh

    def step(self) -> float:
        """One optimizer step on one chunk of every lane; the mean loss in nats per token.

        If gradients are not finite, no weight changes, and the lanes go on from fresh states.
        Raises ArithmeticError if that happens `MOST_SKIPPED` times in a row.
        """
        started = time.monotonic()
        network, batch = self.network, self.lanes.next()
        missing = (0, max(0, self._least_tokens - batch.inputs.shape[1]))
        inputs, targets, fresh = (
            F.pad(batch.inputs, missing).to(network.device),
            F.pad(batch.targets, missing, value=IGNORED).to(network.device),
            batch.fresh.to(network.device),
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.learning_rate(self.tokens, self.time_share)
        with torch.autocast(network.device.type, torch.bfloat16, enabled=self._bf16):
            state = self._state.replace(fresh, self._fresh)
            logits, state = network.unroll(inputs, state)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        network.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite():
            for optimizer in self.optimizers:
                optimizer.step()
            self._state, self.num_skipped = state.detach(), 0
        else:
            self._state, self.num_skipped = self._fresh, self.num_skipped + 1
            if self.num_skipped == MOST_SKIPPED:
                raise ArithmeticError(
                    f"the gradients of {MOST_SKIPPED} steps in a row are not finite;"
                    " try a lower learning rate"
                )
        self.tokens += int((batch.targets >= 0).sum())
        self.elapsed_s += time.monotonic() - started
        return float(loss.detach())

    @property
    def time_share(self) -> float:
        """Of the time that there is for training, how much is over; 0 if it is not limited."""
        return self.elapsed_s / (3600 * self.recipe.hours) if self.recipe.hours else 0.0

    @property
    def is_done(self) -> bool:
        """Whether all tokens have been read, or the time is over."""
        return self.tokens >= self.recipe.tokens or self.time_share >= 1

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, as plain tensors and numbers."""
        pool = self.network.new_pool(self.recipe.lanes)
        self.network.write_state(self._state, pool)
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "lanes": self.lanes.state_dict(),
            "latent": pool.tensors,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ValueError naming the setting that differs from the saved training's."""
        defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
        before = defaults | saved["recipe"]
        for name, value in dataclasses.asdict(self.recipe).items():
            if before[name] != value:
                raise ValueError(f"{name} was {before[name]}, now it is {value}")
        self.tokens, self.elapsed_s = saved["tokens"], saved.get("elapsed_s", 0.0)
        self.lanes.load_state_dict(saved["lanes"])
        pool = self.network.new_pool(self.recipe.lanes)
        pool.tensors.update({k: v.to(pool.device) for k, v in saved["latent"].items()})
        self._state = self.network.read_state(pool)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def new_optimizers(
    network: LanguageModel, weight_decay: float, *, bf16: bool = False
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for the rest, of which only matrices decay."""
    c, layers = network.config, network.blocks
    split = c.n_heads * (3 if c.d_key == c.d_val else 1)
    inner: list[dict[str, Any]] = [
        {"params": [layer.feedforward1[1].weight for layer in layers], "blocks": split},
        {"params": [layer.gate.weight for layer in layers if layer.gate], "blocks": c.n_heads},
        {"params": [layer.feedforward2[i].weight for layer in layers for i in (0, 2)]},
        {"params": [part.weight for layer in layers for part in layer.decay or ()]},
    ]
    outer = [*network.embed.parameters(), network.embed_pos.dense.weight]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": outer},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rest = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    inner = [group for group in inner if group["params"]]
    return Muon(inner, weight_decay, bf16=bf16), rest


def encode_documents(
    words: Tokenizer, texts: list[str], config: ModelConfig, longest: int
) -> list[Tensor]:
    """Each text between `bos` and `eos`; long ones in pieces that begin with `bos` too."""
    start = [] if config.bos_token_id is None else [config.bos_token_id]
    documents = []
    for ids in itertools.chain.from_iterable(
        words.encode_batch(texts[i : i + ENCODE_BATCH]) for i in range(0, len(texts), ENCODE_BATCH)
    ):
        pieces = [ids[i : i + longest] for i in range(0, len(ids), longest)]
        pieces[-1] = [*pieces[-1], *config.eos_token_ids[:1]]
        documents += [torch.tensor([*start, *piece]) for piece in pieces if start or len(piece) > 1]
    return documents


def joined(documents: list[Tensor], least_tokens: int) -> list[Tensor]:
    """Consecutive documents as one, until it has so many tokens.

    A lane begins a document with a chunk, so that the chunks of short ones are padding for a third.
    """
    found, group, num_tokens = [], list[Tensor](), 0
    for document in documents:
        group.append(document)
        num_tokens += len(document)
        if num_tokens >= least_tokens:
            found.append(torch.cat(group))
            group, num_tokens = [], 0
    return [*found, torch.cat(group)] if group else found


def _prepare(
    out: Path, init: Path | None, texts: list[str], shape: ModelConfig, device: torch.device
) -> tuple[LanguageModel, Tokenizer]:
    """The network to train: that of `out`, else of `init`, else a new one with a new tokenizer."""
    source = out if (out / TRAIN_STATE).exists() else init
    if source is not None:
        loaded = checkpoint.load_trainable(source, device)
        return loaded.network, loaded.tokenizer
    words = byte_level.train(texts, shape.vocab_sz, SPECIAL_TOKENS)
    special = words.special_tokens
    config = shape.model_copy(
        update={
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_ids": (special["<|endoftext|>"], special["<|end|>"]),
        }
    )
    return LanguageModel(config).to(device), words


def _save(out: Path, trainer: Trainer, words: Tokenizer, template: str) -> None:
    network = trainer.network
    checkpoint.save(out, network.config, network.state_dict(), words, template)
    torch.save(trainer.state_dict(), out / f".{TRAIN_STATE}")
    (out / f".{TRAIN_STATE}").replace(out / TRAIN_STATE)


def beginning(texts: list[str], num_characters: int | None) -> list[str]:
    """The first documents, the last one cut, with this many characters in all; None: all."""
    if num_characters is None:
        return texts
    starts = itertools.accumulate((len(text) for text in texts), initial=0)
    parts = (text[: num_characters - start] for text, start in zip(texts, starts, strict=False))
    return list(itertools.takewhile(bool, parts))


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens  {task.fields[speed]:.0f}/s  loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[held_out]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, also to go on from.")],
    train: Annotated[list[Path], typer.Option(help="Text to train on (.txt, .jsonl); repeatable.")],
    valid: Annotated[list[Path], typer.Option(help="Text held out; repeatable.")],
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on in all.")] = 20_000_000,
    lanes: Annotated[int, typer.Option(min=1)] = 16,
    chunk_tokens: Annotated[int, typer.Option(min=1)] = 256,
    document_tokens: Annotated[int, typer.Option(min=2, help="Longer texts are cut.")] = 4096,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-3,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.1,
    vocab_sz: Annotated[int, typer.Option(min=300)] = 4096,
    d_emb: Annotated[int, typer.Option(min=1)] = 256,
    n_layers: Annotated[int, typer.Option(min=1)] = 6,
    n_heads: Annotated[int, typer.Option(min=1)] = 8,
    d_key: Annotated[int, typer.Option(min=1)] = 32,
    d_val: Annotated[int, typer.Option(min=1)] = 32,
    signed_values: Annotated[bool, typer.Option(help="Values of any sign, not log v.")] = False,
    decay: Annotated[
        bool, typer.Option(help="Each key channel forgets, beyond the paper.")
    ] = False,
    token_shift: Annotated[bool, typer.Option(help="Mix with the last token's.")] = False,
    output_gate: Annotated[bool, typer.Option(help="A gate on what attention read.")] = False,
    chat: Annotated[
        bool, typer.Option(help="The text has the requests of model.training.requests.")
    ] = False,
    train_characters: Annotated[
        int | None, typer.Option(min=1, help="Of each file, from its start; default: all.")
    ] = None,
    joined_tokens: Annotated[
        int, typer.Option(min=0, help="Shorter texts are joined to so many, for less padding.")
    ] = 0,
    start_tokens: Annotated[
        int, typer.Option(min=0, help="Of --tokens, those that --init has been trained on.")
    ] = 0,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, help="Of training; the end if --tokens are not reached before."),
    ] = None,
    final_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the learning rate, at the end.")
    ] = 0.1,
    save_every_s: Annotated[float, typer.Option(help="Seconds between saved states.")] = 300,
    held_out_characters: Annotated[
        int, typer.Option(min=1, help="Of each file, while training; all at the end.")
    ] = 100_000,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = "",
    bf16: Annotated[
        bool | None,
        typer.Option(help="Matrix products in bfloat16; default: on cuda. On a CPU with it, 1.3x."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="Compile first, which takes minutes and a C++ compiler: 1.5x.")
    ] = False,
) -> None:
    """Train on text and write a checkpoint."""
    console = Console()
    torch.manual_seed(seed)
    template = CHAT_TEMPLATE if chat else LINES_TEMPLATE
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        texts = [
            text for file in train for text in beginning(read_documents(file), train_characters)
        ]
        held_out = {file: read_documents(file) for file in valid}
        if without := [str(file) for file, documents in held_out.items() if not documents]:
            raise ValueError(f"{without[0]}: there is no text in it")
        shape = ModelConfig(
            vocab_sz=vocab_sz,
            d_emb=d_emb,
            n_layers=n_layers,
            n_heads=n_heads,
            d_key=d_key,
            d_val=d_val,
            values="linear" if signed_values else "log",
            decay=decay,
            token_shift=token_shift,
            output_gate=output_gate,
        )
        network, words = _prepare(out, init, texts, shape, place)
        console.print(f"{network.num_parameters:,} parameters on {place}; reading the text")
        documents = joined(
            encode_documents(words, texts, network.config, document_tokens), joined_tokens
        )
        recipe = Recipe(
            train=tuple(file.name for file in train),
            tokens=tokens,
            lanes=lanes,
            chunk_tokens=chunk_tokens,
            document_tokens=document_tokens,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            start_tokens=start_tokens,
            train_characters=train_characters,
            joined_tokens=joined_tokens,
            hours=hours,
            final_share=final_share,
        )
        trainer = Trainer(
            network,
            documents,
            recipe,
            bf16=place.type == "cuda" if bf16 is None else bf16,
            compiled=compiled,
        )
        if (out / TRAIN_STATE).exists():
            trainer.load_state_dict(
                torch.load(out / TRAIN_STATE, map_location=place, weights_only=True)
            )
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    console.print(f"{sum(map(len, documents)):,} tokens of text")

    def measure(limit: int | None) -> dict[str, float]:
        network.eval()
        # Not compiled: each length of a text would be again.
        with torch.compiler.set_stance("force_eager"):
            values = {
                file.name: round(bits_per_byte(network, words, beginning(texts, limit)), 4)
                for file, texts in held_out.items()
            }
        network.train()
        return values

    def save() -> dict[str, float]:
        _save(out, trainer, words, template)
        values = measure(held_out_characters)
        point = {"run": out.name, "tokens": trainer.tokens, "bits_per_byte": values}
        append_line(out / CURVE, {"task": "training", **point})
        return values

    def shown(values: dict[str, float]) -> str:
        named = (f"{value:.4f} {name}" for name, value in values.items())
        return "held-out bits per byte " + ", ".join(named)

    with _progress(console) as progress:
        task = progress.add_task("", total=tokens, speed=0.0, loss=math.nan, held_out="")
        saved, saved_tokens, smooth = time.monotonic(), trainer.tokens, math.nan
        while not trainer.is_done:
            before, started = trainer.tokens, time.monotonic()
            try:
                loss = trainer.step()
            except ArithmeticError as error:
                console.print(f"error: {error}", style="red", markup=False)
                raise typer.Exit(1) from error
            if trainer.num_skipped:
                console.print(f"{before:,} tokens: a step without finite gradients is skipped")
                continue
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            speed = (trainer.tokens - before) / (time.monotonic() - started)
            progress.update(task, completed=trainer.tokens, speed=speed, loss=smooth)
            if time.monotonic() - saved > save_every_s:
                pace = (trainer.tokens - saved_tokens) / (time.monotonic() - saved)
                values = save()
                progress.update(task, held_out=shown(values))
                console.print(
                    f"{trainer.tokens:,} tokens, {pace:,.0f}/s, loss {smooth:.3f}, {shown(values)}"
                )
                saved, saved_tokens = time.monotonic(), trainer.tokens
    save()
    console.print(f"{trainer.tokens:,} tokens, {shown(measure(None))}")


if __name__ == "__main__":
    typer.run(main)
