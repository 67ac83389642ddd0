"""The device of a training: every tensor of a step is on it, and the precision follows from it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from slatewise import cli
from slatewise_train import devices, train_command
from slatewise_train.config import ModelConfig, TrainConfig
from slatewise_train.data import Data
from slatewise_train.devices import choose_bfloat16, describe, find_device
from slatewise_train.train import Trainer, train
from tests.support.pretend_gpu import GPU, PretendGpu
from tests.train.test_offline import make_data
from tests.train.test_shown import load, random_events

torch.set_num_threads(1)

CPU = torch.device("cpu")
MODEL = ModelConfig(
    "ligr", {"width": 8, "blocks": 2, "attention_heads": 2, "set_blocks": 1, "meta_size": 4, "dropout": 0.0}
)
SHORT = TrainConfig(epochs=2, cascade_epochs=1, batch_events=512, negatives=32, id_dropout=0.1, validate_every=1)


def labelled_data() -> Data:
    histories = {f"u{u}": [f"i{(u + k * (u + 1)) % 13}" for k in range(10)] for u in range(12)}
    return make_data(histories, [f"i{k}" for k in range(14)], slate_size=2, validation_users=8)


@pytest.mark.parametrize("slates", [False, True])
def test_all_tensors_of_a_training_are_on_its_gpu(
    slates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(tmp_path, random_events(0)) if slates else labelled_data()
    config = dataclasses.replace(SHORT, slate_loss="lambda") if slates else SHORT
    monkeypatch.setattr("slatewise_train.train.describe", str)
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda device: False)
    on_cpu = train(data, MODEL, config, tmp_path / "cpu")
    with PretendGpu() as gpu:
        trained = train(data, MODEL, config, tmp_path / "gpu", GPU)
        assert not any(gpu.on_gpu(value) for value in trained.model.parameters())
        again = Trainer(data, MODEL, config, GPU)
        again.load(tmp_path / "gpu" / "checkpoint.pt")
        assert all(gpu.on_gpu(value) for value in again.model.parameters())
        again.run_epoch(True)
    assert gpu.seen > 1000
    for name, value in on_cpu.model.state_dict().items():  # the pretended GPU draws the random numbers of the CPU
        torch.testing.assert_close(trained.model.state_dict()[name], value, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "expression", ["torch.ones(2) + gpu", "gpu[torch.tensor([0])]", "gpu.numpy()", "torch.cat([gpu, torch.ones(1)])"]
)
def test_pretended_gpu_refuses_tensors_of_the_cpu(expression: str) -> None:
    with PretendGpu():
        gpu = torch.arange(2.0, device=GPU)
        assert (gpu + 1).device == gpu.sum().to(GPU).device == GPU and gpu.cpu().device == CPU
        with pytest.raises(AssertionError, match="GPU"):
            eval(expression, {"torch": torch, "gpu": gpu})


def test_device_cuda_without_a_gpu_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == CPU == find_device("cpu")
    assert cli.main(["train", str(tmp_path / "x.toml"), "--device", "cuda"]) == 1
    assert re.fullmatch(r"slatewise train: error: --device cuda: .* no CUDA GPU here; .*\n", capsys.readouterr().err)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == GPU == find_device("cuda")


@pytest.mark.parametrize(
    ("wanted", "able", "width", "device", "chosen", "reason"),
    [
        ("auto", True, 128, CPU, True, "faster"),
        ("auto", True, 64, CPU, False, "from width 128 on"),
        ("auto", True, 64, GPU, True, "faster"),
        ("auto", False, 128, CPU, False, "no AMX or AVX512_BF16"),
        ("auto", False, 128, GPU, False, "no bfloat16"),
        (True, False, 64, CPU, True, "WARNING: slow"),
        (True, True, 64, CPU, True, "[train] bfloat16"),
        (False, True, 128, CPU, False, "[train] bfloat16"),
    ],
)
def test_bfloat16_follows_config_device_and_width(
    wanted: bool | str,
    able: bool,
    width: int,
    device: torch.device,
    chosen: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda _: able)
    found, text = choose_bfloat16(wanted, device, width)
    assert found is chosen and reason in text
    assert ("WARNING" in text) is (wanted is True and not able)


def test_processor_with_either_instruction_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, able in (({}, False), ({"amx_bf16": True}, True), ({"amx_bf16": False, "avx512_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert devices.multiplies_bfloat16(CPU) is able


def test_training_in_bfloat16_learns_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(SHORT, bfloat16=True)
    data = labelled_data()
    trainer = train(data, MODEL, config, tmp_path)
    assert "matrix products in bfloat16 ([train] bfloat16" in capsys.readouterr().out
    assert trainer.bfloat16 and all(value.dtype == torch.float32 for value in trainer.model.parameters())
    reference = Trainer(data, MODEL, dataclasses.replace(config, bfloat16=False))
    windows = [(user, 0, 5) for user in range(4)]
    again = Trainer(data, MODEL, config)
    losses = []
    for one in (reference, again):
        torch.manual_seed(0)
        losses.append(one.step_loss(windows, cascade=True).item())  # type: ignore[arg-type]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_threads_of_the_command_are_set_and_told(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads, text in ((3, "CPU, 3 threads (--threads 1 is faster beside other work)"), (1, "CPU, 1 thread")):
            with pytest.raises(FileNotFoundError):
                train_command.main([str(tmp_path / "missing.toml"), "--threads", str(threads), "--device", "cpu"])
            assert torch.get_num_threads() == threads and describe(torch.device("cpu")) == text
        for wrong in ("0", "-1", "many"):
            with pytest.raises(SystemExit):
                train_command.main([str(tmp_path / "missing.toml"), "--threads", wrong])
    finally:
        torch.set_num_threads(before)
