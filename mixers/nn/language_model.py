"""A small language model: embedding, blocks, norm, and the embedding again as the last layer.

    tokens [B,T] → logits [B,T,vocab]         state: one ``LayerState`` a block

The state is of fixed size for every mixer but attention, so a stream of any length takes the memory of one token.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixers.nn.block import Block
from mixers.nn.layer import LayerState, reset_parts
from mixers.nn.norm import RMSNorm
from mixers.packing import Pack

# A prompt is read in pieces of so many tokens, so that its length costs time and no memory.
PIECE = 1024

State = tuple[LayerState, ...]


class LanguageModel(nn.Module):
    """An autoregressive model over whole-numbered tokens.

    Args:
        vocab: number of tokens.
        d_model: width of a token.
        layers: number of blocks.
        heads: heads of every mixer.
        mixer: a mixer's name for all blocks, or one entry a block: a name, or a mapping of arguments of ``Block`` with
            the name under ``mixer``.
        recompute: recompute each block in the backward instead of keeping what is inside (activation checkpointing).
        options: further arguments of every ``Block``, as ``chunk_size=16``; an entry's own come first.

    Attributes:
        config: the arguments, so that ``LanguageModel(**config)`` makes another one.
    """

    def __init__(
        self,
        vocab: int,
        d_model: int,
        layers: int,
        heads: int,
        mixer: str | Sequence[str | Mapping[str, Any]] = "lattice",
        recompute: bool = False,
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__()
        each = [mixer] * layers if isinstance(mixer, str) else list(mixer)
        if len(each) != layers:
            raise ValueError(f"mixer names {len(each)} blocks and layers={layers}; expected one entry a block")
        self.config: dict[str, Any] = {
            "vocab": vocab,
            "d_model": d_model,
            "layers": layers,
            "heads": heads,
            "mixer": mixer if isinstance(mixer, str) else [e if isinstance(e, str) else dict(e) for e in mixer],
            "recompute": recompute,
            **options,
        }
        self.recompute = recompute
        self.embed = nn.Embedding(vocab, d_model)
        common = {"d_model": d_model, "heads": heads, **options}
        self.blocks = nn.ModuleList(
            Block(**{**common, **({"mixer": entry} if isinstance(entry, str) else entry)}) for entry in each
        )
        self.norm = RMSNorm(d_model)
        self._scale()

    def reset_parameters(self) -> None:
        """Give every parameter its first value, as after ``to_empty`` of a model made on the meta device."""
        reset_parts(self)
        self._scale()

    def _scale(self) -> None:
        """Small embeddings: they are the last layer too. Writes into the residual stream shrink with their number."""
        with torch.no_grad():
            nn.init.normal_(self.embed.weight, std=0.02)
            for name, weight in self.blocks.named_parameters():
                if name.endswith(("mixer.out.weight", "mlp.down.weight")):
                    weight.mul_((2 * len(self.blocks)) ** -0.5)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | Pack | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """Predict the next token everywhere.

        Args:
            tokens: ``[B,T]`` whole numbers.
            state: what an earlier call returned; None to begin.
            cu_seqlens: see ``MixerLayer``.
            mask: see ``MixerLayer``; logits at padding mean nothing.
            return_state: False saves the write of the last states.

        Returns:
            ``(logits [B,T,vocab], state)``; the state is None with ``return_state=False``.
        """
        x, state = self.hidden(tokens, state, cu_seqlens, mask, return_state)
        return self.logits(x), state

    def hidden(
        self,
        tokens: Tensor,
        state: State | None,
        cu_seqlens: Tensor | Pack | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """``(x [B,T,D], state)``, what ``logits`` is of: take some tokens of it where not all are asked about."""
        x = self.embed(tokens)
        after = []
        for i, block in enumerate(self.blocks):
            arguments = (x, None if state is None else state[i], cu_seqlens, mask, return_state)
            if self.recompute and torch.is_grad_enabled():
                x, last = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, last = block(*arguments)
            after.append(last)
        return x, tuple(after) if return_state else None

    def logits(self, x: Tensor) -> Tensor:
        """``[...,D]`` to ``[...,vocab]``."""
        return F.linear(self.norm(x), self.embed.weight)

    def generate(
        self,
        prompt: Tensor,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt.

        Args:
            prompt: ``[B,T]``, at least one token.
            tokens: how many to add.
            temperature: 0 takes the likeliest token each time.
            top_k: draw among so many likeliest tokens; None for all.
            generator: the source of randomness.

        Returns:
            ``[B, T+tokens]``: the prompt and what follows.
        """
        return torch.cat([prompt, *(t[:, None] for t in self.stream(prompt, tokens, temperature, top_k, generator))], 1)

    @torch.no_grad()
    def stream(
        self,
        prompt: Tensor,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of ``generate``, ``[B]`` each, as they are drawn; memory stays what one state takes."""
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ValueError(f"the prompt has shape {tuple(prompt.shape)}, expected [B,T] with at least one token")
        state = None
        for piece in torch.split(prompt, PIECE, dim=1):
            x, state = self.hidden(piece, state)
        for i in range(tokens):
            drawn = _draw(self.logits(x[:, -1]).float(), temperature, top_k, generator)
            yield drawn
            if i + 1 < tokens:
                x, state = self.hidden(drawn[:, None], state)

    def save(self, path: str | Path, **more: Any) -> None:
        """Write a checkpoint: the model's arguments and weights, and ``more`` beside them (an optimiser's state)."""
        torch.save({"config": self.config, "weights": self.state_dict(), **more}, path)

    @classmethod
    def load(cls, path: str | Path, device: Any = "cpu") -> tuple["LanguageModel", dict[str, Any]]:
        """Read a checkpoint: the model, and what was saved beside it."""
        more = torch.load(path, map_location=device, weights_only=True)
        model = cls(**more.pop("config")).to(device)
        model.load_state_dict(more.pop("weights"))
        return model, more


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """``[B,vocab]`` to ``[B]``."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
