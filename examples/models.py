"""Networks of the examples: a small CNN, torchvision's ResNets and a small character GPT."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class SimpleCNN(nn.Module):
    """Two convolutions with pooling, then two linear layers.

    Takes images [batch, channels, height, width] of at least 4 x 4 pixels, returns logits
    [batch, classes].
    """

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.linear1 = nn.Linear(32 * (height // 4) * (width // 4), 128)
        self.dropout = nn.Dropout(0.25)
        self.linear2 = nn.Linear(128, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        hidden = functional.relu(self.linear1(hidden.flatten(1)))
        return self.linear2(self.dropout(hidden))


class Block(nn.Module):
    """One pre-norm transformer block: causal attention, then a four times wider MLP; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        projected = self.query_key_value(self.attention_norm(hidden))
        query, key, value = projected.view(
            batch, length, 3, self.heads, width // self.heads
        ).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp_out(
            functional.gelu(self.mlp_in(self.mlp_norm(hidden)), approximate="tanh")
        )


class CharGPT(nn.Module):
    """A small GPT over characters.

    Takes character ids [batch, length] (int64, length up to `length`), returns logits
    [batch, length, characters].
    Width 64 with 2 blocks has about 0.11 M parameters, width 128 with 4 blocks about 0.8 M.
    """

    def __init__(self, characters: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(characters, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, characters, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            # GPT-2's rule: what is added to the stream 2 * layers times starts that much smaller.
            added_to_stream = name.endswith(("attention_out.weight", "mlp_out.weight"))
            nn.init.normal_(
                parameter, std=0.02 / math.sqrt(2 * layers) if added_to_stream else 0.02
            )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.token_embedding(ids) + self.position_embedding(positions)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def resnet(name: str, channels: int, classes: int) -> nn.Module:
    """Return torchvision's resnet18 or resnet50, not pretrained, with a stem for small images.

    The stem is the one that is usual for CIFAR, a 3x3 convolution with stride 1 and no max pooling:
    torchvision's 7x7 stride-2 stem would leave one place of a 32 x 32 image in the last stage, this
    one leaves 4 x 4.
    Takes images [batch, channels, height, width], returns logits [batch, classes].
    """
    from torchvision.models import resnet18, resnet50

    model = {"resnet18": resnet18, "resnet50": resnet50}[name](num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
