"""Decoders of the supported families in plain PyTorch and float64: the independent reference for logits and gradients.

Reads Hugging Face tensors by name from a dict; knows nothing of Megatron, of packing or of any module of the project.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class Decoder:
    def __init__(self, directory: Path):
        config = json.loads((directory / "config.json").read_text())
        self.weights = {name: tensor.double().requires_grad_() for name, tensor in load_file(directory / "model.safetensors").items()}
        self.layers = config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        self.frequencies, self.attention_factor = rotary_frequencies(config["rope_parameters"], self.head_dim)
        self.tied = config["tie_word_embeddings"]
        self.experts_per_token = config.get("num_experts_per_tok", 0)
        self.weights_sum_to_one = config["model_type"] == "mixtral" or config.get("norm_topk_prob", False)
        self.narrowest_choice = math.inf
        """Smallest difference so far between the logits of the last expert chosen and the first one left out."""

    def logits(self, token_ids: list[int]) -> Tensor:
        """Return the logits [tokens, vocabulary] of one sequence."""
        w = self.weights
        x = w["model.embed_tokens.weight"][token_ids]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, w[prefix + "input_layernorm.weight"]), prefix + "self_attn.")
            y = self._norm(x, w[prefix + "post_attention_layernorm.weight"])
            if prefix + "mlp.gate.weight" in w:
                x = x + self._experts(y, prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"))
            elif prefix + "block_sparse_moe.gate.weight" in w:
                x = x + self._experts(y, prefix + "block_sparse_moe.", ("w1", "w3", "w2"))
            else:
                x = x + self._feed_forward(y, prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"))
        output = w["model.embed_tokens.weight"] if self.tied else w["lm_head.weight"]
        return self._norm(x, w["model.norm.weight"]) @ output.T

    def _feed_forward(self, y: Tensor, prefix: str, names: tuple[str, str, str]) -> Tensor:
        gate, up, down = (self.weights[f"{prefix}{name}.weight"] for name in names)
        return (y @ gate.T * torch.sigmoid(y @ gate.T) * (y @ up.T)) @ down.T

    def _experts(self, y: Tensor, prefix: str, names: tuple[str, str, str]) -> Tensor:
        """Every expert reads every token; experts that a token did not choose have weight 0."""
        logits = y @ self.weights[prefix + "gate.weight"].T
        ordered = logits.detach().sort(-1, descending=True).values
        if self.experts_per_token < ordered.shape[1]:
            margins = ordered[:, self.experts_per_token - 1] - ordered[:, self.experts_per_token]
            self.narrowest_choice = min(self.narrowest_choice, float(margins.min()))
        shares = torch.where(logits >= ordered[:, self.experts_per_token - 1, None], logits.softmax(-1), 0.0)
        if self.weights_sum_to_one:
            shares = shares / shares.sum(-1, keepdim=True)
        return sum(shares[:, [e]] * self._feed_forward(y, f"{prefix}experts.{e}.", names) for e in range(logits.shape[1]))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        tokens = x.shape[0]
        q, k, v = (
            self._project(x, f"{prefix}{part}_proj", heads)
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        if prefix + "q_norm.weight" in self.weights:
            q, k = self._norm(q, self.weights[prefix + "q_norm.weight"]), self._norm(k, self.weights[prefix + "k_norm.weight"])
        q, k = self._rotate(q), self._rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return attended.reshape(tokens, -1) @ self.weights[prefix + "o_proj.weight"].T

    def _project(self, x: Tensor, name: str, heads: int) -> Tensor:
        y = x @ self.weights[name + ".weight"].T
        if name + ".bias" in self.weights:
            y = y + self.weights[name + ".bias"]
        return y.view(x.shape[0], heads, self.head_dim)

    def _rotate(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None, None] * self.frequencies
        a, b = x[..., :half], x[..., half:]
        rotated = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
        return self.attention_factor * rotated


def rotary_frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Return (radians per position of each pair of channels, float64; factor of the rotated vectors).

    linear: https://arxiv.org/abs/2306.15595. llama3: `apply_scaling` in Meta's Llama 3.1, whose three bands are one clamp. yarn:
    https://arxiv.org/abs/2309.00071, with the ramp over pairs of channels of the authors' code.
    """
    half, base = head_dim // 2, rope["rope_theta"]
    pairs = torch.arange(half, dtype=torch.float64)
    frequencies, kind = base ** (-pairs / half), rope.get("rope_type", "default")
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    turns = original * frequencies / (2 * math.pi)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0

    def pair_that_turns(times: float) -> float:
        return half * math.log(original / (2 * math.pi * times), base)

    first, last = math.floor(pair_that_turns(rope.get("beta_fast", 32))), math.ceil(pair_that_turns(rope.get("beta_slow", 1)))
    first, last = max(first, 0), min(last, head_dim - 1)
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), rope.get("attention_factor", 0.1 * math.log(factor) + 1)


def token_logprobs(decoder: Decoder, prompt: list[int], response: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (logprob, entropy) of each response token, float64."""
    logprobs = (decoder.logits(prompt + response)[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)
