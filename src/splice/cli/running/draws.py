"""Sampling whose draws belong to a prompt, and not to the batch that it happens to be answered in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Far enough apart that the seeds of the prompts of one run are none of the next seed's.
_APART = 1_000_003


class Draws:
    """A processor of logits after which the largest score is a draw from the distribution, at a temperature.

    To the logits comes noise (of Gumbel's distribution; the Gumbel-max trick), one for each prompt and step. torch's own
    sampling draws for the rows of a batch in turn: then the answer to a prompt would depend on its neighbours, and two
    adapters could not be told apart from two draws.

    Args:
        temperature: above 0.
        top_p: draw among the most probable tokens alone whose probabilities add up to this much.
        seed: the same seed, the same draws.
        prompts: for each row the number of its prompt. Rows of one prompt get the same noise.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, prompts: Sequence[int]) -> None:
        self._temperature, self._top_p, self._prompts = temperature, top_p, prompts
        self._generators = {
            prompt: torch.Generator().manual_seed((seed * _APART + prompt) % 2**63) for prompt in dict.fromkeys(prompts)
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) for the next token."""
        scores = scores.float() / self._temperature
        if self._top_p < 1:
            scores = scores.masked_fill(_improbable(scores, self._top_p), -torch.inf)
        # On the CPU: a seed means the same numbers everywhere.
        noise = {prompt: _gumbel(scores.shape[-1], generator) for prompt, generator in self._generators.items()}
        return scores + torch.stack([noise[prompt] for prompt in self._prompts]).to(scores.device)


def _gumbel(size: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.empty(size).exponential_(generator=generator)
    return -drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log()


def _improbable(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Where the tokens are that are less probable than all that add up to `top_p`: a mask (rows, vocabulary)."""
    ordered, order = scores.softmax(-1).sort(descending=True)
    # The token with which the sum gets there is still in.
    behind = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(behind).scatter(-1, order, behind)
