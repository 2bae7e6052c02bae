"""A weight is any network: write the legs, and the layer, its plan, its gauge and its rank changes are there.

Here: a binary tree (hierarchical Tucker) with two row modes and two column modes, which no format class names.
"""

import torch

import decompositions as tn
import tnlayers


def tree(modes: tuple[int, int, int, int], rank: int) -> tn.Network:
    """Rows (i, j), columns (k, l); leaves carry the modes, two inner cores and a root join them."""
    i, j, k, l = modes  # noqa: E741
    legs = (("root_a", "root_b"), ("i", "a", "root_a"), ("j", "a"), ("k", "b", "root_b"), ("l", "b"))
    shapes = ((rank, rank), (i, rank, rank), (j, rank), (k, rank, rank), (l, rank))
    skeleton = tn.Network(tuple(torch.empty(s) for s in shapes), legs, rows=("i", "j"), cols=("k", "l"))
    return tn.fill_random(skeleton, std=0.05)


def main(quick: bool = False) -> tuple[int, ...]:
    """Train the layer on a target of lower rank, then cut it to the ranks a tolerance asks for."""
    torch.manual_seed(0)
    layer = tnlayers.Linear(64, 48, bias=False, network=tree((6, 8, 8, 8), rank=6))
    print(tn.explain(layer.network, batch=256))
    target = tn.to_matrix(tree((6, 8, 8, 8), rank=2))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(200 if quick else 2000):
        x = torch.randn(256, 64)
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step:5d}  loss {loss.item():.2e}")

    spectra = tn.bond_singular_values(layer.network.detach())
    for bond, values in spectra.items():
        print(f"bond {bond:<7} singular values {', '.join(f'{v:.1e}' for v in values)}")
    layer.set_network(tn.round(layer.network.detach(), tol=0.2 if quick else 0.02))
    print(
        f"ranks after rounding: {layer.network.ranks}; relative error "
        f"{((layer.weight - target).norm() / target.norm()).item():.1e}"
    )
    return layer.network.ranks


if __name__ == "__main__":
    main()
