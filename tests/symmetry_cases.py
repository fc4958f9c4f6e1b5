"""Small modules of every kind, each with inputs: for the tests of what is found."""

import torch
from torch import nn
from torch.nn import functional as F


class Wrap(nn.Module):
    """A module from a function of itself and inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.f = forward

    def forward(self, *inputs):
        return self.f(self, *inputs)


def attention(x, q, k, v, heads, turned=None):
    """Of what three layers give, with as many heads of keys as there are."""
    b, t, _ = x.shape
    q = q(x).view(b, t, heads, -1).transpose(1, 2)
    k, v = (m(x).view(b, t, -1, q.shape[-1]).transpose(1, 2) for m in (k, v))
    if turned is not None:
        q, k = turned(q), turned(k)
    k, v = (y.repeat_interleave(heads // y.shape[1], 1) for y in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotary(x):
    at = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 2.0 ** -torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * at.cos() - b * at.sin(), b * at.cos() + a * at.sin()], -1)


def self_attention(**named):
    return Wrap(
        lambda s, x: s.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(4, 2, batch_first=True, **named)
    )


def heads(kv=2, turned=None, bias=False):
    def linear(o):
        return nn.Linear(4, o, bias=bias)

    return Wrap(
        lambda s, x: s.o(attention(x, s.q, s.k, s.v, 2, turned)),
        q=linear(8),
        k=linear(4 * kv),
        v=linear(4 * kv),
        o=nn.Linear(8, 4, bias=bias),
    )


def fused():
    def forward(s, x):
        q, k, v = (y.unflatten(-1, (2, 2)).transpose(1, 2) for y in s.qkv(x).chunk(3, -1))
        return s.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))

    return Wrap(forward, qkv=nn.Linear(4, 12), o=nn.Linear(4, 4))


def rms(s, x):
    return s.g * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()


def rms_norm(d):
    return nn.RMSNorm(d, eps=0.1)  # so large that the stream's scale is no symmetry, not even nearly


def images(n=60):
    return torch.randn(n, 2, 4, 4)


def rows(n=120, d=4):
    return torch.randn(n, d)


def words(n=60, t=3, d=4):
    return torch.randn(n, t, d)


def stream(norm):
    """A residual stream between layers, normalised before each branch."""
    return Wrap(
        lambda s, x: s.out(s.n2((h := s.into(x)) + s.down(F.gelu(s.up(s.n1(h)))))),
        into=nn.Linear(4, 5),
        n1=norm(5),
        up=nn.Linear(5, 3),
        down=nn.Linear(3, 5),
        n2=norm(5),
        out=nn.Linear(5, 6),
    )


def squeeze():
    return Wrap(
        lambda s, x: s.out(
            (y := F.relu(s.c(x))).mul(torch.sigmoid(s.b(F.relu(s.a(y.mean((2, 3))))))[..., None, None]).mean((2, 3))
        ),
        c=nn.Conv2d(2, 4, 3),
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 4),
        out=nn.Linear(4, 6),
    )


def recurrent(kind, **named):
    return Wrap(lambda s, x: s.o(s.r(x)[0]), r=kind(4, 3, batch_first=True, **named), o=nn.Linear(3, 5))


def cell(kind):
    def forward(s, x):
        state, out = None, []
        for part in x.unbind(1):
            state = s.r(part, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return s.o(torch.stack(out, 1))

    return Wrap(forward, r=kind(4, 3), o=nn.Linear(3, 5))


def low_rank():
    return Wrap(
        lambda s, x: s.o(F.gelu(s.w(x) + s.b(s.a(x)))),
        w=nn.Linear(4, 5),
        a=nn.Linear(4, 2, bias=False),
        b=nn.Linear(2, 5, bias=False),
        o=nn.Linear(5, 6),
    )


def tied():
    e = nn.Embedding(6, 4)
    return Wrap(
        lambda s, x: s.u(F.gelu(s.m(s.n(s.e(x).sum(1))))) @ s.e.weight.t(),
        e=e,
        n=rms_norm(4),
        m=nn.Linear(4, 5),
        u=nn.Linear(5, 4),
    )


def experts():
    return Wrap(
        lambda s, x: s.o(sum(s.g(x).softmax(-1)[:, e : e + 1] * m(x) for e, m in enumerate(s.x))),
        g=nn.Linear(3, 2),
        x=nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 4)) for _ in range(2)),
        o=nn.Linear(4, 5),
    )


S, L = nn.Sequential, nn.Linear
CASES = {
    "relu": lambda: (S(L(4, 5), nn.ReLU(), L(5, 3)), rows()),
    "leaky": lambda: (S(L(4, 5), nn.LeakyReLU(), L(5, 3)), rows()),
    "prelu": lambda: (S(L(4, 5), nn.PReLU(5), L(5, 3)), rows()),
    "prelu one": lambda: (S(L(4, 5), nn.PReLU(), L(5, 3)), rows()),
    "gelu": lambda: (S(L(4, 5), nn.GELU(), L(5, 3)), rows()),
    "tanh": lambda: (S(L(4, 5), nn.Tanh(), L(5, 3)), rows()),
    "abs": lambda: (Wrap(lambda s, x: s.b(s.a(x).abs()), a=L(4, 5), b=L(5, 3)), rows()),
    "linear": lambda: (S(L(4, 3), L(3, 5)), rows()),
    "linear without bias": lambda: (S(L(4, 3, bias=False), L(3, 5, bias=False)), rows()),
    "bottleneck of three": lambda: (S(L(4, 3), L(3, 3), L(3, 5)), rows()),
    "convolutions": lambda: (S(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(3, 4, 2)), images()),
    "pooled": lambda: (S(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), L(3, 4)), images()),
    "depthwise": lambda: (
        S(nn.Conv2d(2, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 4, 2, groups=4), nn.LeakyReLU(), nn.Conv2d(4, 3, 1)),
        images(),
    ),
    "grouped": lambda: (
        S(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        images(),
    ),
    "transposed": lambda: (S(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 1)), images()),
    "batch norm": lambda: (
        S(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2)),
        images(),
    ),
    "batch norm eval": lambda: (
        S(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2)).eval(),
        images(),
    ),
    "group norm": lambda: (
        S(nn.Conv2d(2, 4, 2, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 2)),
        images(),
    ),
    "layer norm": lambda: (S(L(4, 5), nn.LayerNorm(5), L(5, 6)), rows()),
    "layer norm without gains": lambda: (S(L(4, 5), nn.LayerNorm(5, elementwise_affine=False), L(5, 6)), rows()),
    "rms norm": lambda: (S(L(4, 5), rms_norm(5), L(5, 6)), rows()),
    "rms written out": lambda: (
        Wrap(lambda s, x: s.b(rms(s, s.a(x))), a=L(4, 5), b=L(5, 6), g=nn.Parameter(torch.randn(5))),
        rows(),
    ),
    "stream": lambda: (stream(rms_norm), rows(200)),
    "stream centred": lambda: (stream(nn.LayerNorm), rows(200)),
    "swiglu": lambda: (Wrap(lambda s, x: s.d(F.silu(s.g(x)) * s.u(x)), g=L(4, 5), u=L(4, 5), d=L(5, 3)), rows()),
    "reglu": lambda: (Wrap(lambda s, x: s.d(F.relu(s.g(x)) * s.u(x)), g=L(4, 5), u=L(4, 5), d=L(5, 3)), rows()),
    "low rank": lambda: (low_rank(), rows()),
    "attention": lambda: (self_attention(), words()),
    "attention without bias": lambda: (self_attention(bias=False), words()),
    "attention bias kv": lambda: (self_attention(add_bias_kv=True), words()),
    "cross attention": lambda: (
        Wrap(lambda s, x, y: s.a(x, y, y)[0], a=nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)),
        words(),
        words(d=3),
    ),
    "fused": lambda: (fused(), words()),
    "heads": lambda: (heads(), words()),
    "grouped queries": lambda: (heads(1), words()),
    "rotary": lambda: (heads(2, rotary), words(t=4)),
    "encoder layer": lambda: (nn.TransformerEncoderLayer(4, 2, 5, 0.0, F.leaky_relu, batch_first=True), words(70)),
    "encoder layer norm first": lambda: (
        nn.TransformerEncoderLayer(4, 2, 5, 0.0, F.leaky_relu, batch_first=True, norm_first=True),
        words(70),
    ),
    "decoder layer": lambda: (
        nn.TransformerDecoderLayer(4, 2, 5, 0.0, F.leaky_relu, batch_first=True),
        words(70),
        words(70),
    ),
    "decoder layer norm first": lambda: (
        nn.TransformerDecoderLayer(4, 2, 5, 0.0, F.leaky_relu, batch_first=True, norm_first=True),
        words(70),
        words(70),
    ),
    "transformer": lambda: (nn.Transformer(4, 2, 1, 1, 5, 0.0, F.leaky_relu, batch_first=True), words(20), words(20)),
    "tied embeddings": lambda: (tied(), torch.cartesian_prod(*[torch.arange(6)] * 3)),
    "squeeze and excite": lambda: (squeeze(), images(120)),
    "experts": lambda: (experts(), rows(200, 3)),
    "RNN": lambda: (recurrent(nn.RNN), words(40)),
    "RNN relu": lambda: (recurrent(nn.RNN, nonlinearity="relu"), words(40)),
    "LSTM": lambda: (recurrent(nn.LSTM), words(40)),
    "GRU": lambda: (recurrent(nn.GRU), words(40)),
    "RNNCell": lambda: (cell(nn.RNNCell), words(40)),
    "LSTMCell": lambda: (cell(nn.LSTMCell), words(40)),
    "GRUCell": lambda: (cell(nn.GRUCell), words(40)),
}
