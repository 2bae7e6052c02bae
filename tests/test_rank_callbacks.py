"""Rank-adaptive training inside transformers' Trainer and Lightning (skipped where they are not installed)."""

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import LowRank
from tnlayers.optim import lightning_callback, trainer_callback


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tnlayers.Linear(8, 16, network=tnlayers.random_network(LowRank, rank=1))
        self.head = nn.Linear(16, 3)

    def forward(self, x=None, labels=None):
        y = self.head(self.inner(x).relu())
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def items(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(8, generator=generator), "labels": torch.randint(0, 3, (), generator=generator)}
        for _ in range(count)
    ]


@pytest.mark.filterwarnings("ignore")
def test_trainer(tmp_path):
    pytest.importorskip("accelerate")  # its Trainer asks for it
    transformers = pytest.importorskip("transformers")
    model = Model()
    optimizer = tnlayers.RankAdaptive(model, 1e-2, tol=0.1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=8, logging_steps=5, report_to=[],
        use_cpu=True, save_steps=5,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=items(), optimizers=(optimizer, None), callbacks=[trainer_callback(0.5)]
    )
    trainer.train()
    assert optimizer.fixed
    assert optimizer.steps == 10
    assert any("rank/inner" in entry for entry in trainer.state.log_history)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            self.own = tnlayers.RankAdaptive(self.model, 1e-2, tol=0.1)
            return self.own

    module = Module()
    trainer = lightning.Trainer(
        max_steps=10, accelerator="cpu", callbacks=[lightning_callback(0.5)], logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(items(), batch_size=8))
    assert module.own.steps == 10
    assert module.own.fixed


def test_what_is_missing_is_named():
    for make in (trainer_callback, lightning_callback):
        with pytest.raises(ValueError, match=r"settle must be a part of the steps"):
            make(1.5)
    for make, package in ((trainer_callback, "transformers"), (lightning_callback, "lightning")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(ImportError, match=f"needs {package}"):
                make()
