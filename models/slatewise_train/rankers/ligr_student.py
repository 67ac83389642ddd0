"""Students: smaller rankers of the same family, initialised from a larger one, the teacher.

With this start a student needs only a few epochs of `distill.py`. Width, item table and exits stay, so teacher and
student use the same bundle. Depth, feed-forward layers, and the heads of queries, keys and values may shrink. This
needs a family with gated attention blocks, in lists `blocks` and `set_blocks`, and the sizes of SHRINKS in its config.

Called by: `bases.py`. The student is then trained by `distill.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slatewise_train.rankers import families
from slatewise_train.rankers.base import Ranker

SHRINKS = ("blocks", "set_blocks", "attention_heads", "key_heads", "key_size", "feed_forward")


def half(config: Any) -> dict[str, int]:
    """The default shape of a student: half the blocks, feed-forward layers half as wide, and half the query size."""
    key_size = config.query_width // config.attention_heads
    return {
        "blocks": max(1, config.blocks // 2),
        "feed_forward": max(1, config.feed_forward // 2),
        "key_size": max(2, key_size // 4 * 2),
    }


@torch.no_grad()
def shrink(teacher: Ranker, shape: Mapping[str, int]) -> Ranker:
    """A ranker of that shape, initialised from the teacher. Raises ValueError for a shape that is not possible."""
    config = student_config(teacher, shape)
    columns = families.ItemColumns({}, teacher.numeric_mean.clone(), teacher.numeric_std.clone())
    student = families.build(teacher.family, config, columns)
    weights = student.state_dict()
    same = {name: v for name, v in teacher.state_dict().items() if "blocks." not in name and name in weights}
    student.load_state_dict(same, strict=False)
    for part in ("blocks", "set_blocks"):
        blocks = getattr(student, part)
        originals = getattr(teacher, part)
        for k, block in enumerate(blocks):
            initialise_block(block, originals[k * len(originals) // len(blocks)], config, teacher.config)
    return student.eval()


def student_config(teacher: Ranker, shape: Mapping[str, int]) -> Any:
    """The teacher's config with the sizes of `shape`. Raises ValueError as `shrink` does."""
    config: Any = teacher.config
    before = dataclasses.asdict(config)
    if missing := set(SHRINKS) - before.keys():
        raise ValueError(f"the family {teacher.family!r} cannot shrink: it has no {', '.join(sorted(missing))}")
    if unknown := shape.keys() - set(SHRINKS):
        raise ValueError(
            f"a student has its teacher's {', '.join(sorted(unknown))}; it may have less of {', '.join(SHRINKS)}"
        )
    before["key_heads"] = before["key_heads"] or before["attention_heads"]
    before["key_size"] = before["key_size"] or config.value_size
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
    return dataclasses.replace(config, **before | {"key_heads": key_heads} | dict(shape))


def initialise_block(block: Any, original: Any, config: Any, before: Any) -> None:
    """Initialise a smaller block from an original one, given both configs.

    Rotary pairs of queries and keys are subsampled evenly (half of them are exactly the frequencies of a head of half
    the size). Key and value heads that become shared are averaged (GQA, arXiv 2305.13245). The feed-forward layer
    keeps the hidden units with the largest norms.
    """
    for name in ("attention_norm", "feed_forward_norm", "attention_gate", "feed_forward_gate", "out"):
        getattr(block, name).load_state_dict(getattr(original, name).state_dict())
    old_heads = before.attention_heads
    new_heads = config.attention_heads
    old_keys = before.key_heads or old_heads
    new_keys = config.key_heads or new_heads
    old_size = before.query_width // old_heads
    new_size = config.query_width // new_heads
    # A product of fewer pairs is smaller, and attention divides it by the root of another size.
    scale = (old_size / new_size) ** 0.25 if new_heads == old_heads else 1.0
    for name, heads, groups in (("query", old_heads, new_heads), ("key", old_keys, new_keys)):
        for part in ("weight", "bias"):
            rows = getattr(getattr(original, name), part)
            getattr(getattr(block, name), part).copy_(scale * regroup(rows, heads, groups, old_size, new_size))
    for part in ("weight", "bias"):
        rows = getattr(original.value, part).unflatten(0, (old_keys, -1))
        per_head = config.value_width // new_keys
        # Values of merged attention heads stay side by side; values of shared heads are averaged.
        shared = rows.flatten(0, 1).unflatten(0, (new_keys, -1, per_head)).mean(1)
        getattr(block.value, part).copy_(shared.flatten(0, 1))
    norms = original.up.weight.norm(dim=1) * original.down.weight.norm(dim=0)
    units = norms.topk(block.up.out_features).indices.sort().values
    block.up.weight.copy_(original.up.weight[units])
    block.up.bias.copy_(original.up.bias[units])
    block.down.weight.copy_(original.down.weight[:, units])
    block.down.bias.copy_(original.down.bias)


def regroup(rows: Tensor, heads: int, groups: int, old_size: int, new_size: int) -> Tensor:
    """Rows (heads * old size, ...) of queries or keys -> (groups * new size, ...).

    Each group is the mean of its heads, with an even subsample of their rotary pairs (i, i + size / 2).
    """
    left, right = rows.unflatten(0, (groups, heads // groups, 2, old_size // 2)).mean(1).unbind(1)
    pairs = torch.arange(new_size // 2) * old_size // new_size
    return torch.cat([left[:, pairs], right[:, pairs]], dim=1).flatten(0, 1)
