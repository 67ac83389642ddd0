"""A smaller ranker of the same family, begun from a larger one's weights, so that few epochs of `distill.py` make it useful.

Width, item table and exits stay, so both read the same bundle; what shrinks is the depth, the feed-forward layers, and the heads of
queries, keys and values. Before: a trained `Ligr`. After: `distill.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from slatewise_train.rankers.ligr import Block, Ligr, LigrConfig

SHRINKS = ("blocks", "set_blocks", "attention_heads", "key_heads", "key_size", "feed_forward")


def half(config: LigrConfig) -> dict[str, int]:
    """The student where nothing is said: half the blocks, feed-forward layers and queries and keys half as wide."""
    key_size = config.query_width // config.attention_heads
    return {
        "blocks": max(1, config.blocks // 2),
        "feed_forward": max(1, config.feed_forward // 2),
        "key_size": max(2, key_size // 4 * 2),
    }


@torch.no_grad()
def shrink(teacher: Ligr, shape: Mapping[str, int]) -> Ligr:
    """A `Ligr` of that shape with the teacher's weights where both have them. Raises ValueError for what cannot be smaller, or would grow."""
    if unknown := shape.keys() - set(SHRINKS):
        raise ValueError(
            f"a student has its teacher's {', '.join(sorted(unknown))}; it may have less of {', '.join(SHRINKS)}"
        )
    before = dataclasses.asdict(teacher.config)
    before |= {
        "key_heads": before["key_heads"] or before["attention_heads"],
        "key_size": before["key_size"] or teacher.config.value_size,
    }
    if grown := [name for name, value in shape.items() if not 1 <= value <= before[name]]:
        raise ValueError(
            f"the teacher has {', '.join(f'{name} = {before[name]}' for name in grown)}: a student has 1 to as many"
        )
    joined = {"attention_heads": before["attention_heads"], "key_heads": before["key_heads"]}
    if unequal := [name for name, heads in joined.items() if heads % shape.get(name, heads)]:
        raise ValueError(
            f"a student's {' and '.join(unequal)} must divide its teacher's: heads are joined or shared as they are"
        )
    if "attention_heads" in shape and before["key_heads"] != before["attention_heads"]:
        raise ValueError(
            "a teacher whose queries share keys keeps its attention_heads: its values cannot be told apart"
        )
    config = LigrConfig(
        **before | {"key_heads": min(before["key_heads"], shape.get("attention_heads", before["key_heads"]))} | shape
    )
    student = Ligr(config, {}, teacher.numeric_mean.clone(), teacher.numeric_std.clone())
    kept = {
        name: value
        for name, value in teacher.state_dict().items()
        if "blocks." not in name and name in student.state_dict()
    }
    student.load_state_dict(kept, strict=False)
    for blocks, originals in ((student.blocks, teacher.blocks), (student.set_blocks, teacher.set_blocks)):
        for k, block in enumerate(blocks):
            fill(block, originals[k * len(originals) // len(blocks)], config, teacher.config)
    return student.eval()


def fill(block: Block, original: Block, config: LigrConfig, before: LigrConfig) -> None:
    """A block from a larger one: evenly spread rotary pairs of queries and keys (of heads half their size, just the frequencies these have), the
    means of heads that are shared from now on (GQA, arXiv 2305.13245), the hidden units of the feed-forward layer that weigh most.
    """
    for name in ("attention_norm", "feed_forward_norm", "attention_gate", "feed_forward_gate", "out"):
        getattr(block, name).load_state_dict(getattr(original, name).state_dict())
    old_heads = before.attention_heads
    new_heads = config.attention_heads
    old_keys = before.key_heads or old_heads
    new_keys = config.key_heads or new_heads
    old_size = before.query_width // old_heads
    new_size = config.query_width // new_heads
    scale = (
        (old_size / new_size) ** 0.25 if new_heads == old_heads else 1.0
    )  # fewer pairs are summed, over another root of their number
    for name, heads, groups in (("query", old_heads, new_heads), ("key", old_keys, new_keys)):
        for part in ("weight", "bias"):
            rows = getattr(getattr(original, name), part)
            getattr(getattr(block, name), part).copy_(scale * regroup(rows, heads, groups, old_size, new_size))
    for part in ("weight", "bias"):
        rows = getattr(original.value, part).unflatten(0, (old_keys, -1))
        per_head = config.value_width // new_keys
        shared = (
            rows.flatten(0, 1).unflatten(0, (new_keys, -1, per_head)).mean(1)
        )  # heads that are joined stand side by side, those shared are averaged
        getattr(block.value, part).copy_(shared.flatten(0, 1))
    weight = original.up.weight.norm(dim=1) * original.down.weight.norm(dim=0)
    units = weight.topk(block.up.out_features).indices.sort().values
    block.up.weight.copy_(original.up.weight[units])
    block.up.bias.copy_(original.up.bias[units])
    block.down.weight.copy_(original.down.weight[:, units])
    block.down.bias.copy_(original.down.bias)


def regroup(rows: Tensor, heads: int, groups: int, old_size: int, new_size: int) -> Tensor:
    """Rows (heads * old size, ...) of queries or keys -> (groups * new size, ...): the means of a group, and evenly spread rotary pairs of these."""
    left, right = rows.unflatten(0, (groups, heads // groups, 2, old_size // 2)).mean(1).unbind(1)  # pairs (i, i + D/2)
    pairs = torch.arange(new_size // 2) * old_size // new_size
    return torch.cat([left[:, pairs], right[:, pairs]], dim=1).flatten(0, 1)
