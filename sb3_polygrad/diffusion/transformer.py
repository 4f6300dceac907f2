"""The causal transformer over the steps of a trajectory (Table 3)."""

from __future__ import annotations

import torch as th
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from sb3_polygrad.diffusion.denoiser import Denoiser
from sb3_polygrad.diffusion.embeddings import FourierEmbedding

N_HEADS = 4
"""Attention heads (Table 3)."""


class Block(nn.Module):
    """
    Causal self-attention and a two-layer MLP, each added to its input, which is normalised first (pre-LN).

    :param width: length of a token, a multiple of :data:`N_HEADS`
    :raises ValueError: for another width
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % N_HEADS != 0:
            raise ValueError(
                f"world_model_kwargs: width={width} must be a multiple of the {N_HEADS} attention heads, which share it"
            )
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: th.Tensor) -> th.Tensor:
        """``(batch, length, width)`` to the same."""
        heads = self.query_key_value(self.attention_norm(tokens)).unflatten(2, (3, N_HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens = tokens + self.merge(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


class Transformer(Denoiser):
    """
    Denoises a trajectory token by token: token t + 1 holds the noisy state t + 1 and the action t that led there.

    So the output for a state depends on the noisy states up to that one and the actions that precede it, on nothing later.
    (Departs from the paper, which pairs the state of a step with the action taken *in* it.) Every token has a learned
    position, and the embedding of its own noise level is added to it: the same for all, or one for each state as the
    staggered sampler has it. The start is never noisy; its level is 0.

    :param horizon: number of actions; there is one state more
    :param channels: channels per state (observation, reward, terminal)
    :param action_dim: length of an action
    :param width: length of a token (Table 3: 312)
    :param n_layers: number of blocks (Table 3: 6)
    """

    def __init__(self, horizon: int, channels: int, action_dim: int, width: int = 312, n_layers: int = 6) -> None:
        super().__init__()
        self.embed_token = nn.Linear(channels + action_dim, width)
        self.embed_level = FourierEmbedding(width)
        self.position = nn.Parameter(0.02 * th.randn(horizon + 1, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(n_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        """See :class:`Denoiser`; ``horizon`` steps."""
        tokens = self.embed_token(th.cat([noisy, pad(actions, (0, 0, 1, 0))], dim=2))  # no action leads to the start
        levels = pad(level.expand(-1, actions.shape[1]), (1, 0))  # (batch or 1, horizon + 1)
        embedded = self.embed_level(levels.reshape(-1, 1)).view(*levels.shape, -1)
        return self.head(self.blocks(tokens + self.position + embedded))
