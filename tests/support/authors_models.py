"""Small ViT and Swin with the structure of the RLRR paper, written from its formulas; the oracles of the parity tests.

Every trained tensor lies in ``model.trained`` under its name in the authors' files, every frozen one in
``model.frozen``.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Oracle:
    """Named tensors, and the three operations the paper's models are made of."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.frozen: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}

    def to(self, dtype: torch.dtype) -> Oracle:
        """A copy that computes in ``dtype``, with the same values: those drawn are fp32's."""
        other = copy.copy(self)
        other.frozen = {name: tensor.to(dtype) for name, tensor in self.frozen.items()}
        other.trained = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.trained.items()}
        return other

    def as_backbone(self, weight: Tensor, bias: Tensor) -> Oracle:
        """A copy in which nothing was trained but the head [C, D], [C]: the frozen network."""
        other = copy.copy(self)
        other.trained = {
            name: torch.ones_like(tensor) if "ssf_scale" in name else torch.zeros_like(tensor)
            for name, tensor in self.trained.items()
        }
        other.trained |= {"head.weight": weight.detach(), "head.bias": bias.detach()}
        return other

    def draw(self, *shape: int, mean: float = 0.0, std: float = 0.1) -> Tensor:
        return mean + std * torch.randn(*shape, generator=self.generator)

    def train(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.3) -> None:
        self.trained[name] = self.draw(*shape, mean=mean, std=std).requires_grad_()

    def make_linear(self, name: str, rows: int, cols: int, bias: bool = True) -> None:
        self.frozen[f"{name}.weight"] = self.draw(rows, cols, std=cols**-0.5)
        if bias:
            self.frozen[f"{name}.bias"] = self.draw(rows)
        self.train(f"{name}.scale_line", rows, 1)
        self.train(f"{name}.scale_col", 1, cols)
        self.train(f"{name}.shift_bias", 1, rows)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """y = x (W + s_r ⊙ W ⊙ s_c)ᵀ + (b + f), Eq. 16."""
        weight, line, col = self.frozen[f"{name}.weight"], *(self.trained[f"{name}.scale_{k}"] for k in ("line", "col"))
        bias = self.trained[f"{name}.shift_bias"]
        if f"{name}.bias" in self.frozen:
            bias = bias + self.frozen[f"{name}.bias"]
        return x @ (weight + line * weight * col).t() + bias

    def make_norm(self, name: str, size: int, ssf: str | None = None) -> None:
        self.frozen[f"{name}.weight"] = self.draw(size, mean=1.0)
        self.frozen[f"{name}.bias"] = self.draw(size)
        if ssf is not None:
            self.make_ssf(ssf, size)

    def make_ssf(self, name: str, size: int) -> None:
        self.train(name.format("scale"), size, mean=1.0)
        self.train(name.format("shift"), size)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.frozen[f"{name}.weight"] + self.frozen[f"{name}.bias"]

    def ssf(self, name: str, x: Tensor) -> Tensor:
        return x * self.trained[name.format("scale")] + self.trained[name.format("shift")]

    def make_head(self, classes: int, size: int) -> None:
        self.train("head.weight", classes, size)
        self.train("head.bias", classes)

    def head(self, x: Tensor) -> Tensor:
        return x @ self.trained["head.weight"].t() + self.trained["head.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, heads apart; q, k and v are [..., L, D], bias broadcasts to [..., heads, L, L]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-3, -2) for t in (q, k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


class AuthorsViT(Oracle):
    """q, k and v as three layers; SSF after both norms, the final norm and on the patch tokens; branch dropout."""

    def __init__(self, depth=3, size=48, heads=3, patch=16, image=32, classes=5, drop=0.0, seed=0) -> None:
        super().__init__(seed)
        self.depth, self.heads, self.patch, self.drop = depth, heads, patch, drop
        embeddings = "transformer.embeddings"
        self.frozen[f"{embeddings}.patch_embeddings.weight"] = self.draw(size, 3, patch, patch, std=0.02)
        self.frozen[f"{embeddings}.patch_embeddings.bias"] = self.draw(size)
        self.frozen[f"{embeddings}.cls_token"] = self.draw(1, 1, size)
        self.frozen[f"{embeddings}.position_embeddings"] = self.draw(1, (image // patch) ** 2 + 1, size)
        self.make_ssf("transformer.embeddings.ssf_{}_patch", size)
        for i in range(depth):
            layer = f"transformer.encoder.layer.{i}"
            for name in ("query", "key", "value", "out"):
                self.make_linear(f"{layer}.attn.{name}", size, size)
            self.make_linear(f"{layer}.ffn.fc1", 4 * size, size)
            self.make_linear(f"{layer}.ffn.fc2", size, 4 * size)
            for name in ("attn_norm", "ffn_norm"):
                self.make_norm(f"{layer}.{name}", size, f"{layer}.ssf_{{}}_{name}")
        self.make_norm("transformer.encoder.encoder_norm", size, "transformer.encoder.ssf_{}_enc_norm")
        self.make_head(classes, size)

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] to logits [B, C]; with ``drop`` as in training."""
        embeddings = "transformer.embeddings"
        patches = F.conv2d(
            images,
            self.frozen[f"{embeddings}.patch_embeddings.weight"],
            self.frozen[f"{embeddings}.patch_embeddings.bias"],
            stride=self.patch,
        )
        tokens = self.ssf("transformer.embeddings.ssf_{}_patch", patches.flatten(2).transpose(1, 2))
        cls = self.frozen[f"{embeddings}.cls_token"].expand(len(images), -1, -1)
        x = torch.cat([cls, tokens], 1) + self.frozen[f"{embeddings}.position_embeddings"]
        for i in range(self.depth):
            layer = f"transformer.encoder.layer.{i}"
            rate = self.drop * i / (self.depth - 1)
            h = self.ssf(f"{layer}.ssf_{{}}_attn_norm", self.norm(f"{layer}.attn_norm", x, 1e-6))
            q, k, v = (self.linear(f"{layer}.attn.{name}", h) for name in ("query", "key", "value"))
            x = x + F.dropout(self.linear(f"{layer}.attn.out", attention(q, k, v, self.heads)), rate)
            h = self.ssf(f"{layer}.ssf_{{}}_ffn_norm", self.norm(f"{layer}.ffn_norm", x, 1e-6))
            x = x + F.dropout(self.linear(f"{layer}.ffn.fc2", F.gelu(self.linear(f"{layer}.ffn.fc1", h))), rate)
        x = self.norm("transformer.encoder.encoder_norm", x, 1e-6)
        return self.head(self.ssf("transformer.encoder.ssf_{}_enc_norm", x)[:, 0])

    def timm_state(self) -> dict[str, Tensor]:
        """The frozen tensors under the names of timm's ViT, q, k and v in one."""
        embeddings, state = "transformer.embeddings", {}
        state["cls_token"] = self.frozen[f"{embeddings}.cls_token"]
        state["pos_embed"] = self.frozen[f"{embeddings}.position_embeddings"]
        for key in ("weight", "bias"):
            state[f"patch_embed.proj.{key}"] = self.frozen[f"{embeddings}.patch_embeddings.{key}"]
            state[f"norm.{key}"] = self.frozen[f"transformer.encoder.encoder_norm.{key}"]
            for i in range(self.depth):
                theirs, ours = f"transformer.encoder.layer.{i}", f"blocks.{i}"
                qkv = [self.frozen[f"{theirs}.attn.{name}.{key}"] for name in ("query", "key", "value")]
                state[f"{ours}.attn.qkv.{key}"] = torch.cat(qkv)
                state[f"{ours}.attn.proj.{key}"] = self.frozen[f"{theirs}.attn.out.{key}"]
                for part in ("fc1", "fc2"):
                    state[f"{ours}.mlp.{part}.{key}"] = self.frozen[f"{theirs}.ffn.{part}.{key}"]
                for part, name in (("norm1", "attn_norm"), ("norm2", "ffn_norm")):
                    state[f"{ours}.{part}.{key}"] = self.frozen[f"{theirs}.{name}.{key}"]
        return state

    def google_arrays(self) -> dict[str, np.ndarray]:
        """The frozen tensors as Google published such ViTs: kernels [in, out], attention with an axis for its heads."""
        frozen = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in self.frozen.items()}
        arrays = {
            "cls": frozen["embeddings.cls_token"],
            "embedding/kernel": frozen["embeddings.patch_embeddings.weight"].transpose(2, 3, 1, 0),
            "embedding/bias": frozen["embeddings.patch_embeddings.bias"],
            "Transformer/posembed_input/pos_embedding": frozen["embeddings.position_embeddings"],
            "Transformer/encoder_norm/scale": frozen["encoder.encoder_norm.weight"],
            "Transformer/encoder_norm/bias": frozen["encoder.encoder_norm.bias"],
        }
        for i in range(self.depth):
            layer, block = f"encoder.layer.{i}", f"Transformer/encoderblock_{i}"
            for name, norm in (("LayerNorm_0", "attn_norm"), ("LayerNorm_2", "ffn_norm")):
                arrays[f"{block}/{name}/scale"] = frozen[f"{layer}.{norm}.weight"]
                arrays[f"{block}/{name}/bias"] = frozen[f"{layer}.{norm}.bias"]
            attention, size = f"{block}/MultiHeadDotProductAttention_1", frozen[f"{layer}.attn_norm.weight"].size
            for part in ("query", "key", "value"):
                weight, bias = (frozen[f"{layer}.attn.{part}.{key}"] for key in ("weight", "bias"))
                arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(size, self.heads, -1)
                arrays[f"{attention}/{part}/bias"] = bias.reshape(self.heads, -1)
            arrays[f"{attention}/out/kernel"] = frozen[f"{layer}.attn.out.weight"].T.reshape(self.heads, -1, size)
            arrays[f"{attention}/out/bias"] = frozen[f"{layer}.attn.out.bias"]
            for j in (0, 1):
                arrays[f"{block}/MlpBlock_3/Dense_{j}/kernel"] = frozen[f"{layer}.ffn.fc{j + 1}.weight"].T
                arrays[f"{block}/MlpBlock_3/Dense_{j}/bias"] = frozen[f"{layer}.ffn.fc{j + 1}.bias"]
        return arrays


class AuthorsSwin(Oracle):
    """Fused qkv with one s_c, RLRR on the patch-merging reduction too, SSF after block norms and the final norm.

    The frozen tensors have the names of Microsoft's files: a stage's patch merging lies at its end.
    """

    def __init__(self, depths=(2, 2), heads=(2, 4), size=16, window=7, image=112, classes=5, seed=0) -> None:
        super().__init__(seed)
        self.depths, self.heads, self.window, self.grid = depths, heads, window, image // 4
        self.frozen["patch_embed.proj.weight"] = self.draw(size, 3, 4, 4, std=0.05)
        self.frozen["patch_embed.proj.bias"] = self.draw(size)
        self.make_norm("patch_embed.norm", size)
        for stage, depth in enumerate(depths):
            for i in range(depth):
                block = f"layers.{stage}.blocks.{i}"
                self.make_linear(f"{block}.attn.qkv", 3 * size, size)
                self.make_linear(f"{block}.attn.proj", size, size)
                self.make_linear(f"{block}.mlp.fc1", 4 * size, size)
                self.make_linear(f"{block}.mlp.fc2", size, 4 * size)
                for norm in ("norm1", "norm2"):
                    self.make_norm(f"{block}.{norm}", size, f"{block}.ssf_{{}}_{norm}")
                table = self.draw((2 * window - 1) ** 2, heads[stage])
                self.frozen[f"{block}.attn.relative_position_bias_table"] = table
            if stage + 1 < len(depths):
                self.make_norm(f"layers.{stage}.downsample.norm", 4 * size)
                self.make_linear(f"layers.{stage}.downsample.reduction", 2 * size, 4 * size, bias=False)
                size *= 2
        self.make_norm("norm", size, "ssf_{}_encode_norm")
        self.make_head(classes, size)

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] to logits [B, C]."""
        x = F.conv2d(images, self.frozen["patch_embed.proj.weight"], self.frozen["patch_embed.proj.bias"], stride=4)
        x, grid = self.norm("patch_embed.norm", x.permute(0, 2, 3, 1), 1e-5), self.grid
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = self.block(f"layers.{stage}.blocks.{i}", x, grid, self.heads[stage], shifted=i % 2 == 1)
            if stage + 1 < len(self.depths):
                corners = [x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)]
                x = self.norm(f"layers.{stage}.downsample.norm", torch.cat(corners, -1), 1e-5)
                x, grid = self.linear(f"layers.{stage}.downsample.reduction", x), grid // 2
        return self.head(self.ssf("ssf_{}_encode_norm", self.norm("norm", x, 1e-5)).mean((1, 2)))

    def block(self, name: str, x: Tensor, grid: int, heads: int, shifted: bool) -> Tensor:
        window = self.window
        shift = window // 2 if shifted and grid > window else 0  # one window over all of the grid is not shifted
        h = self.ssf(f"{name}.ssf_{{}}_norm1", self.norm(f"{name}.norm1", x, 1e-5))
        # Windows by explicit indices: position p of the shifted grid is position (p + shift) mod grid of the image.
        index = (torch.arange(grid) + shift) % grid
        windows = h[:, index][:, :, index].unflatten(1, (-1, window)).unflatten(3, (-1, window))  # [B, y, wy, x, wx, D]
        windows = windows.transpose(2, 3).flatten(3, 4)  # [B, y, x, window², D]
        q, k, v = self.linear(f"{name}.attn.qkv", windows).chunk(3, -1)
        bias = self.position_bias(name, heads) + self.mask(grid, shift)[:, :, None]
        attended = self.linear(f"{name}.attn.proj", attention(q, k, v, heads, bias))
        attended = attended.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        back = torch.argsort(index)
        x = x + attended[:, back][:, :, back]
        h = self.ssf(f"{name}.ssf_{{}}_norm2", self.norm(f"{name}.norm2", x, 1e-5))
        return x + self.linear(f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", h)))

    def position_index(self) -> Tensor:
        """[window², window²]: the row of the bias table for each pair of positions."""
        y, x = torch.meshgrid(torch.arange(self.window), torch.arange(self.window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        offset = self.window - 1
        return (y[:, None] - y + offset) * (2 * self.window - 1) + x[:, None] - x + offset

    def position_bias(self, name: str, heads: int) -> Tensor:
        table = self.frozen[f"{name}.attn.relative_position_bias_table"]
        return table[self.position_index().flatten()].view(self.window**2, self.window**2, heads).permute(2, 0, 1)

    def mask(self, grid: int, shift: int) -> Tensor:
        """[y, x, window², window²]: -100 between positions that were neighbours only by wrapping around."""
        position = torch.arange(grid)
        region = (position >= grid - self.window).long() + (position >= grid - shift).long() if shift else position * 0
        regions = region[:, None] * 3 + region
        regions = regions.unflatten(0, (-1, self.window)).unflatten(2, (-1, self.window)).transpose(1, 2).flatten(2)
        return torch.where(regions[..., :, None] == regions[..., None, :], 0.0, -100.0)

    def microsoft_state(self) -> dict[str, Tensor]:
        """What Microsoft's files hold: the frozen tensors, and the index and mask buffers."""
        state, grid = dict(self.frozen), self.grid
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                block = f"layers.{stage}.blocks.{i}"
                state[f"{block}.attn.relative_position_index"] = self.position_index()
                if i % 2 and grid > self.window:
                    state[f"{block}.attn_mask"] = self.mask(grid, self.window // 2).flatten(0, 1)
            grid //= 2
        return state
