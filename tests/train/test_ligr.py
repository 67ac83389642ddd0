"""The equations of the ranker, one property in each test, on a model with random weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_BUCKETS, START_ITEM, UNKNOWN_ITEM
from slatewise_train.rankers.layers import rotate
from slatewise_train.rankers.ligr import Block, Ligr, LigrConfig

torch.set_num_threads(1)

ITEMS = 20
ACTIONS = 4
NUMERIC = 2
HEADS = 2
FIELD = torch.zeros(ITEMS, 3, dtype=torch.int64)  # 3 values: item 5 has one, item 6 two, item 7 all three
FIELD[5, 0] = 2
FIELD[6, :2] = torch.tensor([1, 3])
FIELD[7] = torch.tensor([1, 2, 3])


def make_model(attention_heads: int = 2, set_blocks: int = 1, **shape: int) -> Ligr:
    """A model with random weights, including those that are initialised with zeros or ones."""
    torch.manual_seed(0)
    config = LigrConfig(
        ITEMS,
        ACTIONS,
        {"genre": 4},
        NUMERIC,
        HEADS,
        width=8,
        attention_heads=attention_heads,
        set_blocks=set_blocks,
        meta_size=3,
        dropout=0.5,
        **shape,
    )
    model = Ligr(config, {"genre": FIELD}, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


MODEL = make_model()
SHALLOW = make_model(blocks=3, decoder_blocks=1)  # for candidates


def draw_events(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items, actions and gaps (1, T + 1), start token first."""
    columns = [torch.randint(low, high, (1, length)) for low, high in ((0, ITEMS), (0, ACTIONS), (0, GAP_BUCKETS))]
    items, actions, gaps = (
        torch.cat([torch.tensor([[first]]), column], dim=1)
        for first, column in zip((START_ITEM, 0, 0), columns, strict=True)
    )
    return items, actions, gaps


@torch.no_grad()
def encode(
    items: Tensor, actions: Tensor, gaps: Tensor, model: Ligr = MODEL
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    return model.encode(model.tokens(model.item_table()[items], actions, gaps))


@torch.no_grad()
def point_hidden(vectors: Tensor, numeric: Tensor, length: int, model: Ligr = MODEL) -> Tensor:
    torch.manual_seed(length)
    state, _ = encode(*draw_events(length), model)
    fused = model.fuse(numeric, torch.randn(1, 1, 3), torch.randn(1, 1, CONTEXT_SIZE))
    return model.hidden(vectors, state, torch.tensor([length + 1]), None, fused)


@given(first=st.integers(0, 300), second=st.integers(0, 300), shift=st.integers(0, 300), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_rotate_depends_on_relative_position_only(first: int, second: int, shift: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = torch.randn(2, 1, 3, 1, 8, dtype=torch.float64)

    def turn(x: Tensor, position: int) -> Tensor:
        return rotate(x, torch.tensor([position]))

    torch.testing.assert_close(turn(query, first).norm(dim=-1), query.norm(dim=-1), rtol=1e-5, atol=0)
    near = (turn(query, first) * turn(key, second)).sum(-1)
    far = (turn(query, first + shift) * turn(key, second + shift)).sum(-1)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-3)  # angles are float32


def test_rotate_changes_every_position_except_zero() -> None:
    x = torch.randn(2, 2, 3, 8)
    turned = rotate(x, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().max() > 0.1
    each = rotate(x, torch.tensor([[0, 1, 2], [5, 6, 7]]))  # positions of their own for every row of the batch
    torch.testing.assert_close(each[0], turned[0])
    torch.testing.assert_close(each[1], rotate(x, torch.tensor([5, 6, 7]))[1])


def slow_block(block: Block, x: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The equation of a block for rows (N, d) without positions, in float64, one row and attention head at a time."""
    w = {name: parameter.detach().double().numpy() for name, parameter in block.named_parameters()}

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    result = []
    size = key.shape[-1]
    shared = block.heads // len(key)
    for row in x:
        query = dense("query", norm("attention_norm", row))
        read = []
        for h in range(block.heads):
            weights = np.exp(key[h // shared] @ query[h * size : (h + 1) * size] / np.sqrt(size))
            read.append(weights @ value[h // shared] / weights.sum())
        row = row + dense("out", np.concatenate(read)) * sigmoid(dense("attention_gate", row))
        up = dense("up", norm("feed_forward_norm", row))
        gelu = up * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in up]))
        result.append(row + dense("down", gelu) * sigmoid(dense("feed_forward_gate", row)))
    return np.array(result)


@pytest.mark.parametrize(
    ("heads", "key_heads", "key_size"), [(1, 1, 8), (2, 2, 4), (4, 4, 2), (4, 2, 2), (2, 1, 2), (1, 1, 2)]
)
@pytest.mark.parametrize(("n", "keys"), [(1, 1), (5, 3), (2, 9)])
def test_block_equals_equation_1_of_the_paper(heads: int, key_heads: int, key_size: int, n: int, keys: int) -> None:
    model = make_model(attention_heads=heads, key_heads=key_heads, key_size=key_size)
    torch.manual_seed(n)
    x = 3 * torch.randn(1, n, 8) + 1
    key = torch.randn(1, key_heads, keys, key_size)
    value = torch.randn(1, key_heads, keys, 8 // heads)
    with torch.no_grad():
        found = model.blocks[0](x, key, value, None, None)[0]
    expected = slow_block(model.blocks[0], *(a[0].double().numpy() for a in (x, key, value)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@given(length=st.integers(1, 12), data=st.data())
@settings(max_examples=20, deadline=None)
def test_later_event_does_not_change_earlier_positions(length: int, data: st.DataObject) -> None:
    torch.manual_seed(length)
    events = draw_events(length)
    changed = data.draw(st.integers(1, length))
    column, rows = data.draw(st.sampled_from(list(enumerate((ITEMS, ACTIONS, GAP_BUCKETS)))))
    others = [e.clone() for e in events]
    others[column][0, changed] = (others[column][0, changed] + 1) % rows
    (state, users) = encode(*events)
    (other_state, other_users) = encode(*others)
    torch.testing.assert_close(users[:, :changed], other_users[:, :changed], rtol=0, atol=1e-6)
    assert (users[:, changed:] - other_users[:, changed:]).abs().amax(-1).min() > 1e-5, (
        "and every later position reads it"
    )
    for kept, other in zip(state, other_state, strict=True):
        for a, b in zip(kept, other, strict=True):
            torch.testing.assert_close(a[:, :, :changed], b[:, :, :changed], rtol=0, atol=1e-6)


def test_order_of_events_changes_the_user_vector() -> None:
    items, actions, gaps = draw_events(4)
    items[0, 1:] = torch.tensor([4, 5, 6, 7])
    actions[:] = 0
    gaps[:] = 2
    swapped = items[:, [0, 2, 1, 3, 4]]
    assert (encode(items, actions, gaps)[1][0, -1] - encode(swapped, actions, gaps)[1][0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("model", [MODEL, SHALLOW], ids=["all", "last"])
@given(n=st.integers(1, 40), length=st.integers(0, 20), data=st.data())
@settings(max_examples=20, deadline=None)
def test_point_score_does_not_depend_on_other_candidates(model: Ligr, n: int, length: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, n - 1))
    torch.manual_seed(n)
    vectors = torch.randn(1, n, 8)
    numeric = torch.randn(1, n, NUMERIC)
    others = vectors.clone()
    other_numeric = numeric.clone()
    others[0, changed] = torch.randn(8)
    other_numeric[0, changed] = torch.nan
    one, other = (
        model.point_logits(point_hidden(v, f, length, model)).detach()
        for v, f in ((vectors, numeric), (others, other_numeric))
    )
    rest = torch.arange(n) != changed
    torch.testing.assert_close(one[:, rest], other[:, rest], rtol=0, atol=2e-6)
    assert (one[:, changed] - other[:, changed]).abs().max() > 1e-4


@pytest.mark.parametrize("decoder_blocks", [1, 2, 3])
def test_candidates_pass_the_last_blocks_of_the_history(decoder_blocks: int) -> None:
    model = make_model(blocks=3, decoder_blocks=decoder_blocks)
    state, _ = encode(*draw_events(9), model)
    vectors, fused = torch.randn(2, 1, 5, 8)
    position = torch.tensor([10])
    with torch.no_grad():
        found = model.hidden(vectors, state, position, None, fused)
        expected = vectors
        for k in range(3 - decoder_blocks, 3):
            expected = model.blocks[k](expected, *state[k], position, None)
        torch.testing.assert_close(found, expected + fused, rtol=0, atol=0)
        for k in range(3):
            other = [(key + (i == k), value + (i == k)) for i, (key, value) in enumerate(state)]
            changed = (model.hidden(vectors, other, position, None, fused) - found).abs().max() > 1e-4
            assert changed == (k >= 3 - decoder_blocks), "the blocks before these are not read"


def test_as_many_decoder_blocks_as_blocks_are_the_model_without_them() -> None:
    without = make_model(blocks=3)
    stated = make_model(blocks=3, decoder_blocks=3)
    assert (
        without.state_dict().keys()
        == stated.state_dict().keys()
        == make_model(blocks=3, decoder_blocks=1).state_dict().keys()
    )
    vectors, numeric = torch.randn(1, 5, 8), torch.randn(1, 5, NUMERIC)
    assert torch.equal(point_hidden(vectors, numeric, 6, without), point_hidden(vectors, numeric, 6, stated))


def test_decoder_blocks_keep_the_identity_of_older_checkpoints() -> None:
    config = LigrConfig(9, 4, {"genre": 3}, 2, 1, width=8, dropout=0.5)
    text = (
        "LigrConfig(items=9, actions=4, fields={'genre': 3}, numeric=2, heads=1, width=8, blocks=2, attention_heads=1, "
        "set_blocks=1, feed_forward=4, meta_size=16, dropout=0.5, field_dropout=0.0, key_heads=0, key_size=0)"
    )
    assert repr(config) == repr(replace(config, decoder_blocks=2)) == text
    assert repr(replace(config, decoder_blocks=1)) == text.replace("blocks=2,", "blocks=2, decoder_blocks=1,")


@given(n=st.integers(1, 40), set_blocks=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_set_logits_permute_and_depend_on_other_candidates(n: int, set_blocks: int) -> None:
    model = make_model(set_blocks=set_blocks)
    torch.manual_seed(n)
    hidden = torch.randn(1, n, 8)
    order = torch.randperm(n)
    with torch.no_grad():
        logits = model.set_logits(hidden)
        torch.testing.assert_close(model.set_logits(hidden[:, order]), logits[:, order], rtol=0, atol=1e-5)
        hidden[0, 0] = torch.randn(8)
        if n > 1:
            assert ((model.set_logits(hidden) - logits)[0, 1:].abs().max() > 1e-6) == (set_blocks > 0)


@given(n=st.integers(1, 20), padding=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_set_logits_do_not_depend_on_masked_padding(n: int, padding: int) -> None:
    torch.manual_seed(n)
    hidden = torch.randn(1, n + padding, 8)
    mask = (torch.arange(n + padding) < n)[None, None, None]
    with torch.no_grad():
        torch.testing.assert_close(
            MODEL.set_logits(hidden, mask)[:, :n], MODEL.set_logits(hidden[:, :n]), rtol=0, atol=1e-5
        )


def test_encode_empty_history_is_the_start_token() -> None:
    state, users = encode(*draw_events(0))
    assert users.shape == (1, 1, 8)
    assert {a.shape for pair in state for a in pair} == {(1, 2, 1, 4)}
    assert point_hidden(torch.randn(1, 3, 8), torch.randn(1, 3, NUMERIC), 0).isfinite().all()
    longer = encode(*draw_events(5))[1]
    torch.testing.assert_close(users[:, 0], longer[:, 0], rtol=0, atol=1e-5)


def test_encode_does_not_depend_on_right_padding() -> None:
    events = draw_events(9)
    (_, users) = encode(*events)
    (_, cut) = encode(*(e[:, :5] for e in events))
    torch.testing.assert_close(users[:, :5], cut, rtol=0, atol=1e-6)


def test_item_table_is_id_row_plus_mean_of_field_values() -> None:
    table = MODEL.item_table()
    ids = MODEL.item.weight
    field = MODEL.field["genre"].weight
    torch.testing.assert_close(table[START_ITEM], ids[START_ITEM], msg="the start token has no fields")
    torch.testing.assert_close(table[UNKNOWN_ITEM], ids[UNKNOWN_ITEM] + field[0])
    torch.testing.assert_close(table[4], ids[4] + field[0])
    torch.testing.assert_close(table[5], ids[5] + field[2])
    torch.testing.assert_close(table[6], ids[6] + (field[1] + field[3]) / 2)
    torch.testing.assert_close(table[7], ids[7] + field[1:].mean(0))


def test_cold_item_vector_is_unknown_id_plus_fields() -> None:
    cold_item_vectors = MODEL.cold_item_vectors(MODEL.item_table())
    ids = MODEL.item.weight
    field = MODEL.field["genre"].weight
    torch.testing.assert_close(cold_item_vectors[7], ids[UNKNOWN_ITEM] + field[1:].mean(0))
    torch.testing.assert_close(cold_item_vectors[4], ids[UNKNOWN_ITEM] + field[0])
    torch.testing.assert_close(cold_item_vectors[UNKNOWN_ITEM], MODEL.item_table()[UNKNOWN_ITEM])


def test_field_dropout_drops_whole_vectors_of_fields_in_training() -> None:
    rows = torch.full((4_000,), 6)
    whole = MODEL.field_vectors("genre", rows)
    config = replace(MODEL.config, field_dropout=0.75)
    model = MODEL.resized(config)
    model.load_state_dict(MODEL.state_dict())
    torch.testing.assert_close(model.eval().field_vectors("genre", rows), whole, msg="only in training")
    found = model.train().field_vectors("genre", rows)
    kept = (found != 0).any(1)
    assert 0.22 < kept.float().mean() < 0.28
    torch.testing.assert_close(found[kept], whole[kept] * 4)
    assert (found[~kept] == 0).all()
    known, cold = model.item_vectors(torch.tensor([UNKNOWN_ITEM, *[6] * 50]))  # an item loses the field in both
    difference = (known - cold)[1:]
    torch.testing.assert_close(difference, difference[:1].expand(50, -1))


def test_vectors_of_some_items_are_rows_of_the_tables() -> None:
    table = MODEL.item_table()
    cold = MODEL.cold_item_vectors(table)
    count = len(table)
    for rows in (torch.tensor([UNKNOWN_ITEM]), torch.tensor([UNKNOWN_ITEM, START_ITEM, 6, 4, 7]), torch.arange(count)):
        for found, expected in zip(MODEL.item_vectors(rows), (table, cold), strict=True):
            torch.testing.assert_close(found, expected[rows])


def test_missing_number_differs_from_zero_and_from_mean() -> None:
    meta = torch.randn(1, 1, 3)
    context = torch.randn(1, 1, CONTEXT_SIZE)
    numeric = torch.tensor([[[torch.nan, 2.0], [1.0, 2.0], [0.0, 2.0]]])  # the mean of the first column is 1
    missing, mean, zero = MODEL.fuse(numeric, meta, context)[0].detach()
    assert (missing - mean).abs().max() > 0.01 and (missing - zero).abs().max() > 0.01
    assert MODEL.fuse(torch.tensor([[[3e38, -3e38]]]), meta, context).isfinite().all()


def test_exits_of_an_untrained_model_are_equal() -> None:
    fresh = Ligr(LigrConfig(ITEMS, ACTIONS, {}, NUMERIC, HEADS, width=8), {}, torch.zeros(2), torch.ones(2)).eval()
    hidden = torch.randn(1, 5, 8)
    assert not fresh.point_logits(hidden).any() and not fresh.set_logits(hidden).any()


@pytest.mark.parametrize("events", [3, 400])
def test_tokens_of_few_and_many_events_are_equal_sums(events: int) -> None:
    model = make_model().eval()
    actions = torch.randint(len(model.action.weight), (2, events))
    gaps = torch.randint(len(model.gap.weight), (2, events))
    items = torch.randn(2, events, model.config.width)
    found = model.tokens(items, actions, gaps)
    assert torch.equal(found, items + (model.action.weight[actions] + model.gap.weight[gaps]))
