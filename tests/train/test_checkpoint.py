"""Checkpoints: written completely or not at all, and restored only for the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slatewise_train import checkpoint


def make_parts(seed: int) -> dict[str, checkpoint.Stateful]:
    """A layer and its optimizer after one step."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"layer": layer, "optimizer": optimizer}


def weights(parts: dict[str, checkpoint.Stateful]) -> torch.Tensor:
    found: torch.Tensor = parts["layer"].state_dict()["weight"]
    return found.clone()


def test_load_after_save_restores_parts_and_progress(tmp_path: Path) -> None:
    saved = make_parts(0)
    checkpoint.save(tmp_path / "new" / "x.pt", "me", saved, epoch=3, losses=[0.5])
    other = make_parts(1)
    assert checkpoint.load(tmp_path / "new" / "x.pt", "me", other, "another") == {"epoch": 3, "losses": [0.5]}
    assert torch.equal(weights(other), weights(saved))
    for name, state in saved["optimizer"].state_dict()["state"].items():
        assert torch.equal(other["optimizer"].state_dict()["state"][name]["exp_avg"], state["exp_avg"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.pt"]


def test_load_with_another_identity_raises_and_changes_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.pt", "me", make_parts(0), epoch=3)
    other = make_parts(1)
    before = weights(other)
    with pytest.raises(checkpoint.CheckpointMismatch, match="belongs to another model: use another name in the TOML"):
        checkpoint.load(tmp_path / "x.pt", "you", other, "another model")
    assert torch.equal(weights(other), before)


def test_resume_without_checkpoint_returns_empty_progress(tmp_path: Path) -> None:
    parts = make_parts(0)
    before = weights(parts)
    assert checkpoint.resume(tmp_path / "x.pt", "me", parts, "another") == {}
    assert torch.equal(weights(parts), before)
    with pytest.raises(OSError, match=r"x\.pt"):
        checkpoint.load(tmp_path / "x.pt", "me", parts, "another")


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make_parts(0)
    checkpoint.save(tmp_path / "x.pt", "me", saved, epoch=1)

    def fail(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", fail)
        checkpoint.save(tmp_path / "x.pt", "me", make_parts(1), epoch=2)
    other = make_parts(2)
    assert checkpoint.load(tmp_path / "x.pt", "me", other, "another") == {"epoch": 1}
    assert torch.equal(weights(other), weights(saved))


def test_identity_depends_on_values_and_tensors() -> None:
    one = torch.zeros(3)
    other = torch.tensor([0.0, 0.0, 1e-20])
    found = [
        checkpoint.identity((1, "a"), [one]),
        checkpoint.identity((1, "a"), [other]),
        checkpoint.identity((2, "a")),
    ]
    assert len(set(found)) == 3
    assert checkpoint.identity((1, "a"), [one.clone()]) == found[0]
