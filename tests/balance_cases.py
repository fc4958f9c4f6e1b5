"""Networks whose orbits are walked along, away from their start."""

import torch
from torch import nn
from torch.nn import functional

TOKENS = torch.tensor([[1, 4, 2, 7, 3], [0, 6, 5, 2, 8]])


class Block(nn.Module):
    """nn.MultiheadAttention alone."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class GPT(nn.Module):
    """LayerNorm in front, fused queries, keys and values, GELU, the embedding read again."""

    def __init__(self, width=16, heads=4, layers=2):
        super().__init__()
        self.heads, self.embed, self.place = heads, nn.Embedding(13, width), nn.Embedding(8, width)
        names = {
            "n1": lambda: nn.LayerNorm(width),
            "qkv": lambda: nn.Linear(width, 3 * width),
            "out": lambda: nn.Linear(width, width),
            "n2": lambda: nn.LayerNorm(width),
            "up": lambda: nn.Linear(width, 2 * width),
            "down": lambda: nn.Linear(2 * width, width),
        }
        self.blocks = nn.ModuleList(nn.ModuleDict({n: make() for n, make in names.items()}) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for b in self.blocks:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in b["qkv"](b["n1"](x)).chunk(3, -1))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["out"](y.transpose(1, 2).flatten(2))
            x = x + b["down"](functional.gelu(b["up"](b["n2"](x))))
        return self.head(self.last(x))


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, a gated perceptron, a head of its own."""

    def __init__(self, width=16, heads=4, groups=2):
        super().__init__()
        self.each, self.repeats = width // heads, heads // groups
        self.embed, self.n1, self.n2, self.last = nn.Embedding(13, width), *(nn.RMSNorm(width) for _ in range(3))
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.each, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 24, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(24, width, bias=False), nn.Linear(width, 13, bias=False)

    def turned(self, x):
        half = self.each // 2
        angles = torch.arange(x.shape[-2])[:, None] * 100 ** (-torch.arange(half) / half)
        angles = torch.cat([angles, angles], -1).to(x)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.n1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.each)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turned(q), self.turned(k)
        k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.n2(x)
        x = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.last(x))


class Residual(nn.Module):
    """ReLU on the stream, which scales with all that it meets; batch norms; a gate."""

    def __init__(self, width=6):
        super().__init__()
        self.first, self.start = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.na = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.start(self.first(x)))
        x = torch.relu(x + self.nb(self.b(torch.relu(self.na(self.a(x))))))
        return self.head(x.mean((2, 3)))


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 8))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


CASES = {
    "mlp": (mlp, lambda: images(4, 5)),
    "chain": (lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))), lambda: images(4, 6)),
    "cnn": (cnn, lambda: images(2, 3, 8, 8)),
    "attention": (Block, lambda: images(2, 5, 8)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True),
        lambda: images(2, 5, 8),
    ),
    "gpt": (GPT, lambda: TOKENS),
    "llama": (Llama, lambda: TOKENS),
    "residual": (Residual, lambda: images(2, 3, 8, 8)),
}


def made(name):
    """A network away from its start: biases and gains of every sign, but those of a last norm, in float64."""
    torch.manual_seed(0)
    model = CASES[name][0]().double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 and not (name == "gpt" and key.startswith("last")):
                p.add_(torch.randn_like(p))
    return model, CASES[name][1]()
