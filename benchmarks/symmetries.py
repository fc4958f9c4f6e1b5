"""Which symmetries well-known architectures have, how long it takes to find them, and how exact they are.

python benchmarks/symmetries.py --json results/benchmarks/symmetries.json            # needs the extra `models`
python benchmarks/symmetries.py --json results/benchmarks/symmetries.json --large    # and GPT-2, 124 million

Small configurations of Hugging Face's GPT-2, Llama, BERT, ViT and ResNet, and torch's own encoder layer; weights are as
drawn. ``drift`` is the largest change of an output, relative to the largest output, after a random element of every
space at condition 100, in float32 and float64; Llama rounds to float32 by itself in its norms. Memory is the largest
that the process took, over the parameters' own.
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import environment, save  # noqa: E402

import metatele  # noqa: E402
from metatele.network.graph import tensors_in  # noqa: E402

CONDITION = 100.0
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokens() -> Tensor:
    return torch.randint(50, (2, 6))


def gpt2(**settings: Any) -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **settings))


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, vocab_size=50)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    import transformers

    return transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=48, vocab_size=50))


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(**SMALL, intermediate_size=48, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "GPT-2": (lambda: gpt2(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16), tokens),
    "Llama": (llama, tokens),
    "BERT": (bert, tokens),
    "ViT": (vit, lambda: torch.randn(2, 3, 16, 16)),
    "ResNet": (resnet, lambda: torch.randn(2, 3, 32, 32)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True),
        lambda: torch.randn(2, 6, 32),
    ),
}


@torch.no_grad()
def drift(model: nn.Module, x: Tensor, dtype: torch.dtype, found: metatele.Symmetries) -> float:
    """How much outputs change after a random element of every space."""
    moved = copy.deepcopy(model).to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    before = torch.cat([t.flatten() for t in tensors_in(moved(x))])
    metatele.randomize_(moved, x, condition=CONDITION, seed=0, found=found)
    after = torch.cat([t.flatten() for t in tensors_in(moved(x))])
    return float((after - before).abs().max() / before.abs().max())


def row(name: str, model: nn.Module, x: Tensor, exact: bool = True) -> tuple[dict[str, Any], str]:
    """What is found in one."""
    model.eval()
    begin = time.perf_counter()
    found = metatele.find_symmetries(model, x)
    seconds = time.perf_counter() - begin
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    groups = Counter(space.group for space in found.spaces)
    drifts = {str(t).removeprefix("torch."): drift(model, x, t, found) for t in (torch.float32, torch.float64)}
    return {
        "architecture": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "spaces": len(found.spaces),
        "dimension": found.dimension,
        "groups": dict(groups),
        "dropped": list(found.dropped),
        "unknown": dict(found.unknown),
        "in_none": len(found.frozen),
        "seconds": seconds,
        "peak_over_own": peak / own,
        **({"drift": drifts} if exact else {}),
    }, str(found)


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each architecture."""
    kinds = ("GL", "O", "scale", "phase", "perm", "shift")
    head = ("architecture", "parameters", "dimension", *kinds, "seconds", "drift, float32", "float64")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["architecture"], str(r["parameters"]), str(r["dimension"])]
        cells += [str(r["groups"].get(kind, "")) for kind in kinds] + [f"{r['seconds']:.1f}"]
        cells += [f"{r['drift'][t]:.0e}" for t in ("float32", "float64")] if "drift" in r else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the tables of spaces go beside it, as .md")
    parser.add_argument("--large", action="store_true", help="also GPT-2 with 124 million parameters; 3 GB of memory")
    given = parser.parse_args()
    rows, texts = [], []
    for name, (make, inputs) in ARCHITECTURES.items():
        torch.manual_seed(0)
        found, text = row(name, make(), inputs())
        rows.append(found)
        texts.append(f"## {name}\n\n```\n{text}\n```\n")
    if given.large:
        torch.manual_seed(0)
        rows.append(row("GPT-2, 124 M", gpt2(), torch.randint(50, (1, 8)))[0])
    save(given.json, {"rows": rows, "condition": CONDITION, "environment": environment()})
    if given.json:
        head = "# Symmetries of well-known architectures, in small configurations\n\n"
        given.json.with_suffix(".md").write_text(head + table(rows) + "\n\n" + "\n".join(texts), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
