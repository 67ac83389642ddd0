"""The table of ranker families: a config survives JSON, and errors name the unknown part."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from slatewise_train.rankers import families
from slatewise_train.rankers.base import EXITS, RankerConfig, uncalibrated
from slatewise_train.rankers.ligr import LigrConfig

CONFIG = LigrConfig(items=9, actions=3, fields={}, numeric=2, heads=2, width=8, blocks=1, meta_size=3)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_default_model_of_a_family_has_the_interface(family: str) -> None:
    sizes = {"items": 9, "actions": 3, "fields": {}, "numeric": 2, "heads": 2, "width": 8}
    model = families.build(family, sizes).eval()
    assert model.family == family and isinstance(model.config, RankerConfig)
    table = model.item_table()
    assert table.shape == (9, 8) and model.cold_item_vectors(table).shape == (9, 8)
    encoded, users = model.encode(model.tokens(table[:4][None], torch.zeros(1, 4).long(), torch.zeros(1, 4).long()))
    assert users.shape == (1, 4, 8)
    fused = model.fuse(torch.zeros(1, 5, 2), model.default_meta[None, None], torch.zeros(1, 1, 4))
    hidden = model.hidden(table[None, 2:7], encoded, torch.tensor([4]), None, fused)
    logits = model.logits_by_exit(model.dot_logits(users[:, -1:], table[None, 2:7]), hidden)
    assert tuple(logits) == model.exits == EXITS[: len(model.exits)]
    assert {value.shape for value in logits.values()} == {(1, 5, 2)}
    assert set(families.graphs(model, uncalibrated(model.exits, 2), 10).all()) == {"encode", *model.exits}


def test_build_from_json_config_equals_dataclass() -> None:
    config = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    model = families.build("ligr", config)
    assert model.config == CONFIG and model.meta_size == 3
    other = families.build("ligr", CONFIG)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.item_table(), other.item_table())


def test_build_of_unknown_family_or_config_name_raises() -> None:
    with pytest.raises(ValueError, match="unknown family 'gpt' of rankers; known: dcn, ligr"):
        families.build("gpt", {})
    with pytest.raises(ValueError, match="'ligr' has no widht"):
        families.build("ligr", dataclasses.asdict(CONFIG) | {"widht": 8})


def test_build_with_fields_but_no_columns_raises() -> None:
    with pytest.raises(ValueError, match=r"\['genre'\] need their item columns"):
        families.build("ligr", dataclasses.replace(CONFIG, fields={"genre": 4}))


def test_model_without_set_blocks_has_no_exit_set() -> None:
    assert families.build("ligr", dataclasses.replace(CONFIG, set_blocks=0)).exits == ("dot", "point")


def test_family_without_compression_names_the_missing_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("ligr", CONFIG)
    plain = families.Family(*(getattr(families.FAMILIES["ligr"], name) for name in ("config", "model", "graphs")))
    monkeypatch.setitem(families.FAMILIES, "ligr", plain)
    with pytest.raises(ValueError, match="'ligr' have no low-rank form"):
        families.dense_layers(model)
    with pytest.raises(ValueError, match="'ligr' have no students"):
        families.half(model)
    with pytest.raises(ValueError, match="'ligr' have no students"):
        families.shrink(model, {"blocks": 1})
