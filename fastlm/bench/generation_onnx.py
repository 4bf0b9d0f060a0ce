"""A program that exports a step of GPT-2 to ONNX, with past keys and values, for fastlm/bench/generation.py.

python generation_onnx.py MODEL OUT, in a Python with torch, onnx and safetensors. MODEL is in Transformers' layout. The
graph: ids (rows, new) and positions (new,), past (layers, 2, rows, heads, seen, d) -> logits (rows, vocab) of the last
token, present, like past with the new tokens. It is written for the export, in plain torch, with SDPA's formula.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Step(torch.nn.Module):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.config = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors")
        self.names = {name: name.replace(".", "_") for name in tensors}
        for name, buffer in self.names.items():
            self.register_buffer(buffer, tensors[name])

    def of(self, name: str) -> torch.Tensor:
        return getattr(self, self.names[f"transformer.{name}"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (self.config["n_embd"],), self.of(f"{name}.weight"), self.of(f"{name}.bias"))

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.of(f"{name}.weight") + self.of(f"{name}.bias")

    def forward(self, ids, positions, past):
        heads, width = self.config["n_head"], self.config["n_embd"]
        x, present = self.of("wte.weight")[ids] + self.of("wpe.weight")[positions], []
        for i in range(self.config["n_layer"]):
            h = self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
            q, k, v = (part.unflatten(-1, (heads, width // heads)).transpose(1, 2) for part in h.chunk(3, -1))
            k, v = torch.cat([past[i, 0], k], 2), torch.cat([past[i, 1], v], 2)
            present.append(torch.stack([k, v]))
            scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
            unseen = torch.arange(k.shape[2])[None] > positions[:, None]
            attended = scores.masked_fill(unseen, float("-inf")).softmax(-1) @ v
            x = x + self.linear(attended.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
            h = self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            x = x + self.linear(F.gelu(h, approximate="tanh"), f"h.{i}.mlp.c_proj")
        return self.norm(x[:, -1], "ln_f") @ self.of("wte.weight").t(), torch.stack(present)


def main(directory: str, out: str) -> None:
    step = Step(Path(directory)).eval()
    c, rows, seen, new = step.config, 2, 5, 3
    past = torch.zeros(c["n_layer"], 2, rows, c["n_head"], seen, c["n_embd"] // c["n_head"])
    inputs = torch.zeros(rows, new, dtype=torch.int64), torch.arange(seen, seen + new), past
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        step,
        inputs,
        out,
        input_names=["ids", "positions", "past"],
        output_names=["logits", "present"],
        dynamic_axes={
            "ids": {0: "rows", 1: "new"},
            "positions": {0: "new"},
            "past": {2: "rows", 4: "seen"},
            "logits": {0: "rows"},
            "present": {2: "rows", 4: "all"},
        },
        dynamo=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
