"""A GPT-2 and its training loop in plain PyTorch: what fastlm's time to a loss is held against.

The recipe is the one for a CPU in the README of nanoGPT (Karpathy 2022): 4 layers, 4 heads, 128 wide, no biases, no
dropout, 64 characters, batches of 12 random windows, 2000 iterations; AdamW at 1e-3 (betas 0.9 and 0.99, decay 0.1 on
matrices and tables, norm clipped to 1), 100 iterations of warm-up, cosine to 1e-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class PlainRecipe:
    layers: int = 4
    heads: int = 4
    width: int = 128
    block: int = 64
    batch: int = 12
    steps: int = 2000
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (self.lr - self.min_lr)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT2(nn.Module):
    """GPT-2 without biases; the head is the table of the embedding. ids (B, S), targets (B, S) int64 -> mean loss."""

    def __init__(self, recipe: PlainRecipe, vocab_size: int):
        super().__init__()
        self.word, self.position = nn.Embedding(vocab_size, recipe.width), nn.Embedding(recipe.block, recipe.width)
        self.blocks = nn.ModuleList(_Block(recipe.width, recipe.heads) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, 0.0, 0.02 / (math.sqrt(2 * recipe.layers) if residual else 1.0))

    def forward(self, ids, targets):
        x = self.word(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.word.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainLoop:
    """The loop over random windows of `ids`, (n,) int64; all that is random comes from `seed`."""

    def __init__(self, recipe: PlainRecipe, ids: torch.Tensor, vocab_size: int, seed: int, compiled: bool = False):
        self.recipe, self.ids = recipe, ids
        self.draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = PlainGPT2(recipe, vocab_size)
        self.run = torch.compile(self.model) if compiled else self.model
        decays = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decays, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)

    def warm_up(self) -> None:
        """Compile, and fill caches; nothing is updated."""
        ids = self.ids[: self.recipe.batch * self.recipe.block].view(self.recipe.batch, -1)
        for _ in range(3):
            self.run(ids, ids).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, number: int) -> float:
        """Update once; the loss before it."""
        block = self.recipe.block
        starts = torch.randint(len(self.ids) - block, (self.recipe.batch,), generator=self.draw)
        windows = self.ids[starts[:, None] + torch.arange(block + 1)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(number)
        loss = self.run(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def validate(self, ids: torch.Tensor) -> float:
        """Mean loss on the non-overlapping windows of `ids`, of which every token but the first is predicted.

        The last window is as long as what is left.
        """
        block, total = self.recipe.block, 0.0
        whole = (len(ids) - 1) // block
        inputs, targets = (part[: whole * block].view(-1, block) for part in (ids[:-1], ids[1:]))
        for x, y in zip(inputs.split(256), targets.split(256)):
            total += self.model(x, y).item() * y.numel()
        left = len(ids) - 1 - whole * block
        if left:
            total += self.model(ids[-left - 1 : -1][None], ids[-left:][None]).item() * left
        return total / (len(ids) - 1)
