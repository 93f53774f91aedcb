"""Multi-query associative recall, the task of Zoology (arXiv 2312.04927): pairs first, then questions among blanks.

    k₁ v₁ k₂ v₂ … k_P v_P   0 0 k₂ 0 … k₁ 0 …            0: a word that says nothing
    at each key of the second part, which comes once, the model is to name its value

Keys are words of the lower half of the vocabulary, values of the upper half. A question follows the pairs by an even
number of words, the fewer the likelier: the gap after g such places has a weight of (g+1)^(−0.99).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NEAR = 0.01  # Zoology's exponent
PIECE = 4096  # rows drawn at a time


def associations(
    rows: int, length: int, pairs: Sequence[int], words: int, make: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """So many sequences, each with one of the numbers of pairs.

    Args:
        rows: sequences ``R``.
        length: words of a sequence ``T``, at least 4 for each of the most pairs ``P``.
        pairs: numbers of pairs, each as likely.
        words: the vocabulary; an even number.
        make: the source of randomness, on the device where the sequences are to be.

    Returns:
        ``tokens [R,T]`` int32, and of every question its place ``[R,P]`` int64 and its answer ``[R,P]`` int64, −100
        where a sequence has fewer.
    """
    parts = [_draw(min(PIECE, rows - at), length, pairs, words, make) for at in range(0, rows, PIECE)]
    tokens, places, answers = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, places, answers


def _draw(
    rows: int, length: int, pairs: Sequence[int], words: int, make: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    device, most, half = make.device, max(pairs), words // 2
    many = torch.tensor(list(pairs), device=device)
    many = many[torch.randint(len(pairs), (rows, 1), generator=make, device=device)]
    there = torch.arange(most, device=device) < many  # [R,P]
    keys = 1 + _without_return(torch.zeros(rows, half - 1, device=device), most, make)
    values = torch.randint(half, words, (rows, most), generator=make, device=device)

    gap = torch.arange((length - 2 * min(pairs)) // 2, device=device)
    likely = (NEAR - 1) * torch.log(gap + 1.0) + torch.where(2 * gap + 2 * many < length, 0.0, -torch.inf)
    places = 2 * many + 2 * _without_return(likely, most, make)

    tokens = torch.zeros(rows, length + 1, dtype=torch.int64, device=device)  # what is absent goes to the end
    pair = torch.where(there, 2 * torch.arange(most, device=device), length)
    tokens.scatter_(1, pair, keys)
    tokens.scatter_(1, torch.where(there, pair + 1, length), values)
    tokens.scatter_(1, torch.where(there, places, length), keys)
    answers = torch.where(there, values, -100)
    return tokens[:, :length].int(), torch.where(there, places, 0), answers


def _without_return(log_weights: Tensor, draws: int, make: torch.Generator) -> Tensor:
    """``[R,N]`` to ``[R,draws]``: the first of a draw without return, by Gumbel's trick."""
    noise = torch.rand(log_weights.shape, generator=make, device=make.device).clamp(min=1e-20)
    return (log_weights - torch.log(-torch.log(noise))).topk(draws, dim=1).indices
