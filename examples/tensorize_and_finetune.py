"""Train a small net, replace its layers by tensor layers at a tenth of the parameters, and fine-tune.

Data: the 8x8 digits that come with scikit-learn. The whole conversion is one call; the report says what it cost.
"""

from functools import partial

import torch
from torch import nn

import tnlayers
from decompositions import svd, ttm_svd, tucker2


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and labels; the last 360 are the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:-360], y[:-360], x[-360:], y[-360:]


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, lr: float) -> None:
    """Ordinary loop: tensor layers need nothing of their own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers."""
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def main(quick: bool = False) -> dict[str, float]:
    """Return the accuracies dense, converted and fine-tuned, and the share of parameters kept."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    train(model, x, y, epochs=4 if quick else 15, lr=2e-3)
    dense = accuracy(model, test_x, test_y)

    report = tnlayers.tensorize(
        model,
        {  # the first rule that matches wins
            "2": partial(tucker2, rank=(8, 6)),
            "6": partial(ttm_svd, row_modes=(16, 16), col_modes=(16, 32), rank=8),
            nn.Linear: partial(svd, rank=6),
        },
        example_input=x[:64],
    )
    print(report)
    converted = accuracy(model, test_x, test_y)
    train(model, x, y, epochs=3 if quick else 6, lr=2e-3)
    tuned = accuracy(model, test_x, test_y)
    kept = report.params / report.params_dense
    print(f"accuracy: dense {dense:.3f}, converted {converted:.3f}, fine-tuned {tuned:.3f}; parameters kept {kept:.1%}")
    return {"dense": dense, "converted": converted, "tuned": tuned, "kept": kept}


if __name__ == "__main__":
    main()
