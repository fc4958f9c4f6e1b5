"""Random small networks of the parts from which networks are made: sequences, images, tables; weights used again."""

import random

import torch
from torch import nn
from torch.nn import functional as F

ACTS = (F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.leaky_relu, F.elu, F.softplus, torch.abs, F.relu6)


def positions(x):
    """Constants that differ by position and unit."""
    t, d = x.shape[-2:]
    return (torch.arange(t, dtype=x.dtype)[:, None] * torch.arange(1, d + 1, dtype=x.dtype) / d).sin().to(x)


class Net(nn.Module):
    """A program of random steps on values ``[n, t, d]``; each step takes values that are there and appends one.

    Args:
        seed: Of the program and the weights.
        steps: How many.
    """

    def __init__(self, seed, steps=6):
        super().__init__()
        self.r = random.Random(seed)
        torch.manual_seed(seed)
        self.parts = nn.ModuleList()
        self.free = nn.ParameterList()
        self.program, self.story = [], []
        self.tokens = self.r.random() < 0.3
        self.width = self.r.choice((3, 4, 6))
        if self.tokens:
            table = self.add(nn.Embedding(5, self.width))
            self.sizes = [self.width]
            self.start = table
        else:
            self.sizes, self.start = [self.width], None
        kinds = [name[5:] for name in dir(self) if name.startswith("make_")]
        for _ in range(steps):
            kind = self.r.choice(kinds + ["linear"] * 8 + ["act"] * 6 + ["residual"] * 3)
            at = self.r.choice((len(self.sizes) - 1,) * 3 + tuple(range(len(self.sizes))))
            made = getattr(self, f"make_{kind}")(at, self.sizes[at])
            if made is not None:
                step, size = made
                self.program.append(step)
                self.sizes.append(size)
                self.story.append(f"{len(self.sizes) - 1}={kind}({at})")
        last = self.sizes[-1]
        self.out = nn.Linear(last, 2, bias=self.r.random() < 0.5)
        self.pooled = self.r.random() < 0.5
        if self.tokens and self.r.random() < 0.3:
            self.tied = last == self.width
        else:
            self.tied = False
        for p in self.parameters():
            if p.dim() < 2:
                nn.init.normal_(p)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() == 2 and "free" in name:
                    p.mul_(0.5)

    def forward(self, x):
        values = [self.parts[self.start](x) if self.tokens else x]
        for step in self.program:
            values.append(step(self, values))
        y = values[-1]
        if self.tied:
            return y @ self.parts[self.start].weight.t()
        y = self.out(y)
        return y.mean(1) if self.pooled else y

    def example(self, seed, n=3, t=4):
        g = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(5, (n, t), generator=g)
        return torch.randn(n, t, self.width, generator=g)

    def add(self, module):
        self.parts.append(module)
        return len(self.parts) - 1

    def parameter(self, *shape):
        self.free.append(nn.Parameter(torch.randn(shape)))
        return len(self.free) - 1

    def size(self):
        return self.r.choice((2, 3, 4, 6))

    # --- steps: each returns (function of all values, width)

    def make_linear(self, at, d):
        old = [n for n, m in enumerate(self.parts) if isinstance(m, nn.Linear) and m.in_features == d]
        if old and self.r.random() < 0.25:
            n = self.r.choice(old)
        else:
            n = self.add(nn.Linear(d, self.size(), bias=self.r.random() < 0.7))
        return (lambda self, v: self.parts[n](v[at])), self.parts[n].out_features

    def make_transposed(self, at, d):
        old = [n for n, m in enumerate(self.parts) if isinstance(m, nn.Linear) and m.out_features == d]
        if not old:
            return None
        n = self.r.choice(old)
        return (lambda self, v: v[at] @ self.parts[n].weight), self.parts[n].in_features

    def make_act(self, at, d):
        act = self.r.choice(ACTS)
        return (lambda self, v: act(v[at])), d

    def make_prelu(self, at, d):
        n = self.add(nn.PReLU(self.r.choice((1, d))))
        return (lambda self, v: self.parts[n](v[at].transpose(1, 2)).transpose(1, 2)), d

    def make_norm(self, at, d):
        n = self.add(self.r.choice((nn.LayerNorm, nn.RMSNorm))(d, elementwise_affine=self.r.random() < 0.7))
        return (lambda self, v: self.parts[n](v[at])), d

    def make_rms(self, at, d):
        n = self.parameter(d)
        return (lambda self, v: v[at] * (v[at].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.free[n]), d

    def make_plain_norm(self, at, d):
        return (lambda self, v: v[at] / (v[at].norm(dim=-1, keepdim=True) + 1e-3)), d

    def make_batch_norm(self, at, d):
        n = self.add(nn.BatchNorm1d(d))
        return (lambda self, v: self.parts[n](v[at].transpose(1, 2)).transpose(1, 2)), d

    def make_group_norm(self, at, d):
        n = self.add(nn.GroupNorm(2 if d % 2 == 0 else 1, d))
        return (lambda self, v: self.parts[n](v[at].transpose(1, 2)).transpose(1, 2)), d

    def make_residual(self, at, d):
        others = [n for n, size in enumerate(self.sizes) if size == d and n != at]
        if not others:
            return None
        other, sign = self.r.choice(others), self.r.choice((1, 1, -1, 0.5))
        return (lambda self, v: v[at] + sign * v[other]), d

    def make_product(self, at, d):
        others = [n for n, size in enumerate(self.sizes) if size == d]
        other = self.r.choice(others)
        return (lambda self, v: v[at] * v[other]), d

    def make_quotient(self, at, d):
        others = [n for n, size in enumerate(self.sizes) if size == d and n != at]
        if not others:
            return None
        other = self.r.choice(others)
        return (lambda self, v: v[at] / (v[other].abs() + 1)), d

    def make_glu(self, at, d):
        a, b = self.add(nn.Linear(d, d + 1)), self.add(nn.Linear(d, d + 1, bias=False))
        act = self.r.choice(ACTS)
        return (lambda self, v: act(self.parts[a](v[at])) * self.parts[b](v[at])), d + 1

    def make_fused_glu(self, at, d):
        a, odd = self.add(nn.Linear(d, 6)), self.r.random() < 0.5

        def step(self, v):
            y = self.parts[a](v[at])
            g, u = (y[..., ::2], y[..., 1::2]) if odd else y.chunk(2, -1)
            return F.silu(g) * u

        return step, 3

    def make_gate(self, at, d):
        n = self.add(nn.Linear(d, 1))
        return (lambda self, v: torch.sigmoid(self.parts[n](v[at])) * v[at]), d

    def make_squeeze(self, at, d):
        a, b = self.add(nn.Linear(d, 2)), self.add(nn.Linear(2, d))
        return (
            lambda self, v: v[at] * torch.sigmoid(self.parts[b](F.relu(self.parts[a](v[at].mean(1, keepdim=True)))))
        ), d

    def make_cat(self, at, d):
        other = self.r.randrange(len(self.sizes))
        if self.sizes[other] + d > 8:
            return None
        return (lambda self, v: torch.cat([v[at], v[other]], -1)), d + self.sizes[other]

    def make_part(self, at, d):
        if d < 3:
            return None
        begin, step = self.r.choice(((0, 1), (1, 1), (0, 2)))
        return (lambda self, v: v[at][..., begin::step]), len(range(begin, d, step))

    def make_order(self, at, d):
        kind = self.r.choice(("flip", "roll", "shuffle", "index"))
        order = torch.randperm(d)

        def step(self, v):
            x = v[at]
            if kind == "flip":
                return x.flip(-1)
            if kind == "roll":
                return x.roll(1, -1)
            if kind == "shuffle":
                return x.view(*x.shape[:2], -1, 2).transpose(-1, -2).reshape(x.shape) if d % 2 == 0 else x
            return x[..., order]

        return step, d

    def make_heads(self, at, d):
        if d % 2:
            return None
        n = self.add(nn.Linear(d // 2, 3))
        return (lambda self, v: self.parts[n](v[at].reshape(*v[at].shape[:2], 2, -1)).flatten(2)), 6

    def make_pool(self, at, d):
        return (lambda self, v: v[at] + v[at].mean(1, keepdim=True)), d

    def make_max_pool(self, at, d):
        return (lambda self, v: v[at] + F.max_pool1d(v[at].transpose(1, 2), 3, 1, 1).transpose(1, 2)), d

    def make_constant(self, at, d):
        kind = self.r.choice(("positions", "one", "scale", "vector", "mask"))
        c = torch.randn(d, dtype=torch.float64)

        def step(self, v):
            x = v[at]
            if kind == "positions":
                return x + positions(x)
            if kind == "one":
                return x + 1
            if kind == "scale":
                return x * 0.7
            if kind == "mask":
                return x * (c > 0).to(x)
            return x * c.to(x)

        return step, d

    def make_added(self, at, d):
        n = self.parameter(*self.r.choice(((d,), (1, d), (1,), ())))
        return (lambda self, v: v[at] + self.free[n]), d

    def make_gain(self, at, d):
        n = self.parameter(*self.r.choice(((d,), (1, 1, d), (1,), ())))
        return (lambda self, v: v[at] * self.free[n]), d

    def make_plain(self, at, d):
        o = self.size()
        n = self.parameter(d, o)
        kind = self.r.choice(("@", "einsum", "matmul"))
        return (
            lambda self, v: (
                torch.einsum("nti,io->nto", v[at], self.free[n]) if kind == "einsum" else v[at] @ self.free[n]
            )
        ), o

    def make_low_rank(self, at, d):
        a, b = self.parameter(d, 2), self.parameter(2, d)
        early = self.r.random() < 0.5
        return (
            lambda self, v: (
                v[at] + (v[at] @ (self.free[a] @ self.free[b]) if early else v[at] @ self.free[a] @ self.free[b])
            )
        ), d

    def make_symmetric(self, at, d):
        n = self.parameter(d, d)
        return (lambda self, v: v[at] @ (self.free[n] + self.free[n].t())), d

    def make_masked(self, at, d):
        n = self.parameter(d, d)
        mask = torch.rand(d, d) < 0.6
        return (lambda self, v: v[at] @ (self.free[n] * mask.to(v[at]))), d

    def make_normed_weight(self, at, d):
        n = self.parameter(3, d)
        return (lambda self, v: F.linear(v[at], self.free[n] / self.free[n].norm(dim=1, keepdim=True))), 3

    def make_sliced_weight(self, at, d):
        n = self.parameter(8, 8)
        return (lambda self, v: F.linear(v[at], self.free[n][:4, :d]) if d <= 8 else v[at]), 4 if d <= 8 else d

    def make_experts(self, at, d):
        n, g = self.parameter(2, d, d), self.add(nn.Linear(d, 2))

        def step(self, v):
            w = self.parts[g](v[at]).softmax(-1)
            return torch.einsum("nti,eio,nte->nto", v[at], self.free[n], w)

        return step, d

    def make_branches(self, at, d):
        first, second = [self.add(nn.Linear(d, 3)) for _ in range(2)], [self.add(nn.Linear(3, d)) for _ in range(2)]
        return (
            lambda self, v: sum(self.parts[b](F.relu(self.parts[a](v[at]))) for a, b in zip(first, second, strict=True))
        ), d

    def make_conv(self, at, d):
        groups = self.r.choice((1, 1, d, 2 if d % 2 == 0 else 1))
        o = groups * self.r.choice((1, 2)) if groups > 1 else self.size()
        n = self.add(nn.Conv1d(d, o, 3, padding=1, groups=groups, bias=self.r.random() < 0.6))
        return (lambda self, v: self.parts[n](v[at].transpose(1, 2)).transpose(1, 2)), o

    def make_conv2d(self, at, d):
        a, b = self.add(nn.Conv2d(1, 3, 3, padding=1)), self.add(nn.Conv2d(3, 1, 1))
        return (lambda self, v: self.parts[b](F.relu(self.parts[a](v[at][:, None])))[:, 0]), d

    def make_channels(self, at, d):
        n = self.add(nn.Conv2d(d, 3, (2, 1), padding=(1, 0)))
        return (lambda self, v: self.parts[n](v[at].transpose(1, 2)[..., None])[..., :-1, 0].transpose(1, 2)), 3

    def make_attention(self, at, d):
        bias, masked, rope = self.r.random() < 0.5, self.r.random() < 0.5, self.r.random() < 0.3
        kv = self.r.choice((1, 2))
        q, k, w = (self.add(nn.Linear(d, s, bias=bias)) for s in (4, 2 * kv, 2 * kv))
        o = self.add(nn.Linear(4, d, bias=bias and self.r.random() < 0.5))
        fused = self.r.random() < 0.4

        def turn(x):
            at = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
            a, b = x.chunk(2, -1)
            return x * at.cos() + torch.cat([-b, a], -1) * at.sin()

        def step(self, v):
            x = v[at]
            m, t = x.shape[:2]
            one, two, three = (self.parts[p](x).view(m, t, -1, 2).transpose(1, 2) for p in (q, k, w))
            if rope:
                one, two = turn(one), turn(two)
            two, three = (y.repeat_interleave(2 // kv, 1) for y in (two, three))
            if fused:
                y = F.scaled_dot_product_attention(one, two, three, is_causal=masked)
            else:
                a = one @ two.transpose(-1, -2) / 2
                if masked:
                    a = a.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
                y = a.softmax(-1) @ three
            return self.parts[o](y.transpose(1, 2).reshape(m, t, 4))

        return step, d

    def make_packed_attention(self, at, d):
        if d % 2:
            return None
        n = self.add(
            nn.MultiheadAttention(d, 2, bias=self.r.random() < 0.5, batch_first=True, add_bias_kv=self.r.random() < 0.2)
        )
        other = self.r.choice([m for m, size in enumerate(self.sizes) if size == d])
        weights = self.r.random() < 0.3
        return (lambda self, v: self.parts[n](v[at], v[other], v[other], need_weights=weights)[0]), d

    def make_linear_attention(self, at, d):
        a, b = self.add(nn.Linear(d, 3)), self.add(nn.Linear(d, 3))
        return (lambda self, v: self.parts[a](v[at]) @ (self.parts[b](v[at]).transpose(1, 2) @ v[at])), d

    def make_scores(self, at, d):
        n = self.parameter(d)
        return (lambda self, v: v[at] * (v[at] @ self.free[n]).softmax(1)[..., None]), d

    def make_softmax(self, at, d):
        return (lambda self, v: v[at].softmax(-1)), d

    def make_encoder(self, at, d):
        if d % 2:
            return None
        n = self.add(nn.TransformerEncoderLayer(d, 2, 3, 0.0, batch_first=True, norm_first=self.r.random() < 0.5))
        return (lambda self, v: self.parts[n](v[at])), d

    def make_recurrent(self, at, d):
        kind = self.r.choice((nn.RNN, nn.LSTM, nn.GRU))
        n = self.add(kind(d, 3, batch_first=True, bidirectional=self.r.random() < 0.3))
        return (lambda self, v: self.parts[n](v[at])[0][..., :3]), 3

    def make_cell(self, at, d):
        n = self.add(self.r.choice((nn.RNNCell, nn.GRUCell))(d, 3))

        def step(self, v):
            h, hs = None, []
            for x in v[at].unbind(1):
                h = self.parts[n](x, h)
                hs.append(h)
            return torch.stack(hs, 1)

        return step, 3

    def make_bilinear(self, at, d):
        n = self.add(nn.Bilinear(d, d, 3))
        return (lambda self, v: self.parts[n](v[at], v[at])), 3

    def make_detached(self, at, d):
        return (lambda self, v: v[at].detach() + v[at].clone().mul_(2)), d

    def make_in_place(self, at, d):
        def step(self, v):
            x = v[at].clone()
            x[..., 0] = x[..., 0] * 2
            x[:, 0].add_(1)
            return F.relu(x, inplace=True)

        return step, d

    def make_extreme(self, at, d):
        kind = self.r.choice(("amax", "sum", "max", "std"))

        def step(self, v):
            x = v[at]
            match kind:
                case "amax":
                    return x - x.amax(-1, keepdim=True)
                case "sum":
                    return x - x.sum(-1, keepdim=True)
                case "max":
                    return x - x.max(1, keepdim=True).values
            return x / (x.var(-1, keepdim=True) + 1)

        return step, d

    def make_condition(self, at, d):
        return (lambda self, v: torch.where(v[at] > 0, v[at], 0.1 * v[at])), d

    def make_cumulative(self, at, d):
        return (lambda self, v: v[at].cumsum(1)), d

    def make_outer(self, at, d):
        if d > 3:
            return None
        return (lambda self, v: (v[at][..., :, None] * v[at][..., None, :]).flatten(2)), d * d

    def make_distance(self, at, d):
        n = self.parameter(3, d)
        return (lambda self, v: -(v[at][..., None, :] - self.free[n]).pow(2).sum(-1)), 3

    def make_codes(self, at, d):
        n = self.parameter(5, d)
        return (lambda self, v: (v[at] @ self.free[n].t()).softmax(-1) @ self.free[n]), d
