"""Students of the family `ligr`: smaller rankers, initialised from a larger one, the teacher.

After this initialisation a student needs only a few epochs of `compression/distill.py`. A student keeps the width, the
item table and the exits of its teacher, so both use the same bundle. It may have fewer blocks, for the history or for
the candidates alone, narrower feed-forward layers, and fewer or smaller heads of queries, keys and values.

Called by: `families.py` (its table of families). Calls: `ligr.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slatewise_train.rankers.layers import LowRank
from slatewise_train.rankers.ligr import Block, Ligr, LigrConfig

SHRINKS = ("blocks", "decoder_blocks", "set_blocks", "attention_heads", "key_heads", "key_size", "feed_forward")


def half(config: LigrConfig) -> dict[str, int]:
    """Return the default shape of a student: half the blocks, half the feed-forward width and half the query size."""
    key_size = config.query_width // config.attention_heads
    return {
        "blocks": max(1, config.blocks // 2),
        "feed_forward": max(1, config.feed_forward // 2),
        "key_size": max(2, key_size // 4 * 2),
    }


@torch.no_grad()
def shrink(teacher: Ligr, shape: Mapping[str, int]) -> Ligr:
    """Build a student of a shape, initialised from the teacher. Raises ValueError for a shape that is not possible."""
    config = student_config(teacher.config, shape)
    student = teacher.resized(config)
    weights = student.state_dict()
    same = {name: v for name, v in teacher.state_dict().items() if "blocks." not in name and name in weights}
    student.load_state_dict(same, strict=False)
    for blocks, originals in ((student.blocks, teacher.blocks), (student.set_blocks, teacher.set_blocks)):
        for k, block in enumerate(blocks):
            original = originals[k * len(originals) // len(blocks)]
            assert isinstance(block, Block) and isinstance(original, Block)
            initialise_block(block, original, config, teacher.config)
    return student.eval()


def student_config(teacher: LigrConfig, shape: Mapping[str, int]) -> LigrConfig:
    """Return the teacher's config with the sizes of `shape`. Raises ValueError for a shape that is not possible."""
    if unknown := shape.keys() - set(SHRINKS):
        raise ValueError(
            f"a student has its teacher's {', '.join(sorted(unknown))}; it may have less of {', '.join(SHRINKS)}"
        )
    before: dict[str, Any] = {name: getattr(teacher, name) for name in SHRINKS}
    before["decoder_blocks"] = before["decoder_blocks"] or before["blocks"]
    before["key_heads"] = before["key_heads"] or before["attention_heads"]
    before["key_size"] = before["key_size"] or teacher.value_size
    if grown := [name for name, value in shape.items() if not 1 <= value <= before[name]]:
        sizes = ", ".join(f"{name} = {before[name]}" for name in grown)
        raise ValueError(f"the teacher has {sizes}: a student has at least 1 and at most as many")
    heads = {"attention_heads": before["attention_heads"], "key_heads": before["key_heads"]}
    if unequal := [name for name, count in heads.items() if count % shape.get(name, count)]:
        raise ValueError(
            f"a student's {' and '.join(unequal)} must divide its teacher's, because whole heads are merged"
        )
    if "attention_heads" in shape and before["key_heads"] != before["attention_heads"]:
        raise ValueError("a teacher with shared key heads keeps its attention_heads: its values cannot be separated")
    key_heads = min(before["key_heads"], shape.get("attention_heads", before["key_heads"]))
    decoder_blocks = min(before["decoder_blocks"], shape.get("blocks", before["blocks"]))
    dense = {"key_heads": key_heads, "decoder_blocks": decoder_blocks, "feed_forward_rank": 0}
    return dataclasses.replace(teacher, **before | dense | dict(shape))


def initialise_block(block: Block, original: Block, config: LigrConfig, before: LigrConfig) -> None:
    """Initialise a student's block from a block of the teacher. config: the student's; before: the teacher's.

    Rotary pairs of queries and keys are subsampled evenly. Half of the pairs are exactly the frequencies of a head of
    half the size. Key and value heads that become shared are averaged (GQA, arXiv 2305.13245). The feed-forward layer
    keeps the hidden units with the largest norms. It is dense, also if the teacher's is of low rank.
    """
    for new, old in (
        (block.attention_norm, original.attention_norm),
        (block.feed_forward_norm, original.feed_forward_norm),
        (block.attention_gate, original.attention_gate),
        (block.feed_forward_gate, original.feed_forward_gate),
        (block.out, original.out),
    ):
        new.load_state_dict(old.state_dict())
    old_heads = before.attention_heads
    new_heads = config.attention_heads
    old_keys = before.key_heads or old_heads
    new_keys = config.key_heads or new_heads
    old_size = before.query_width // old_heads
    new_size = config.query_width // new_heads
    # A product of fewer pairs is smaller, and attention divides it by the root of another size.
    scale = (old_size / new_size) ** 0.25 if new_heads == old_heads else 1.0
    for layer, source, heads, groups in (
        (block.query, original.query, old_heads, new_heads),
        (block.key, original.key, old_keys, new_keys),
    ):
        copy_linear(layer, *(scale * regroup(rows, heads, groups, old_size, new_size) for rows in parameters(source)))
    per_head = config.value_width // new_keys
    # Values of merged attention heads stay side by side; values of shared heads are averaged.
    values = (rows.unflatten(0, (old_keys, -1)).flatten(0, 1) for rows in parameters(original.value))
    copy_linear(block.value, *(rows.unflatten(0, (new_keys, -1, per_head)).mean(1).flatten(0, 1) for rows in values))
    assert isinstance(block.up, nn.Linear) and isinstance(block.down, nn.Linear)
    up, up_bias = parameters(original.up)
    down, down_bias = parameters(original.down)
    units = (up.norm(dim=1) * down.norm(dim=0)).topk(block.up.out_features).indices.sort().values
    copy_linear(block.up, up[units], up_bias[units])
    copy_linear(block.down, down[:, units], down_bias)


def parameters(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer, or of the one that two thin layers equal."""
    if isinstance(layer, LowRank):
        return layer.product(), layer.second.bias
    return layer.get_parameter("weight"), layer.get_parameter("bias")


def copy_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def regroup(rows: Tensor, heads: int, groups: int, old_size: int, new_size: int) -> Tensor:
    """Merge and shrink the heads of queries or keys: rows (heads * old size, ...) -> (groups * new size, ...).

    Each group is the mean of its heads, with an even subsample of their rotary pairs (i, i + size / 2).
    """
    left, right = rows.unflatten(0, (groups, heads // groups, 2, old_size // 2)).mean(1).unbind(1)
    pairs = torch.arange(new_size // 2) * old_size // new_size
    return torch.cat([left[:, pairs], right[:, pairs]], dim=1).flatten(0, 1)
