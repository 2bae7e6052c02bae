"""Look into a file of weights without a model: spectra, stable and effective rank, ranks that would do."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompositions.linalg import gram, truncation_rank
from decompositions.progress import Progress
from decompositions.randomized import randomized_basis
from tnlayers.figures import spectrum_figure
from tnlayers.files import open_weights, write_atomic
from tnlayers.page import (
    NOTHING,
    Cell,
    Column,
    by,
    compact,
    figure_png,
    gallery,
    html_page,
    html_table,
    inline_image,
    number,
    paragraph,
    printable,
    shorten,
    text_table,
    tiles,
)
from tnlayers.report import PAGE_FIGURE, plain

TOLERANCES = (0.3, 0.1, 0.03)
MAX_SIDE = 4096
"""Matrices whose smaller side is larger than this get leading singular values only."""
LEADING = 512
"""Number of leading singular values of such a matrix."""
SMALL = 1024


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a file, seen as an m x n matrix (a kernel as out x rest).

    Args:
        name: key in the file.
        kind: "matrix", "embedding" (judged by its name), "kernel", "core" (of a network) or "tensor".
        shape: as stored.
        matrix: (m, n) of the unfolding.
        dtype: as stored, "bfloat16".
        params: number of entries.
        status: "measured"; "not finite" or "skipped", with nothing but a note; "tied" (the same memory as a row above).
        note: in words.
        method: "svd", "gram" (eigenvalues of the Gram matrix in float64), or "leading" (randomized, a part only).
        stable_rank: `‖A‖_F² / ‖A‖_2²`.
        effective_rank: exp of the entropy of the singular values divided by their sum; None if not all are known.
        numerical_rank: singular values above `2 eps ‖A‖_F (1/√m + 1/√n)`, a few times what rounding the entries to
            the stored dtype adds (numpy's `max(m, n) eps σ_1` would call every bfloat16 matrix zero).
        break_even_rank: largest rank at which two factors hold fewer numbers than the matrix, r (m + n) < m n.
        suggested: (relative error, smallest rank that reaches it) pairs; None if it lies beyond the values known.
        spectrum: singular values in descending order (leading ones only where method says so).

    References:
        O. Roy, M. Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.

    Example:
        >>> inspect_tensor("w", torch.eye(4)).effective_rank
        4.0
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    dtype: str
    params: int
    status: str
    note: str = ""
    method: str = ""
    stable_rank: float | None = None
    effective_rank: float | None = None
    numerical_rank: int | None = None
    break_even_rank: int | None = None
    suggested: tuple[tuple[float, int | None], ...] = ()
    spectrum: tuple[float, ...] = ()

    def gains(self, tol: float) -> bool | None:
        """Whether two factors of the rank suggested for `tol` hold fewer numbers than the matrix; None if unknown."""
        rank = dict(self.suggested).get(tol)
        if rank is None:
            return None
        m, n = self.matrix
        return rank * (m + n) < m * n


@dataclass(frozen=True)
class Inspection:
    """What `inspect_file` found: one row a floating tensor of order 2 or more.

    Args:
        rows: in the order of the state dict; of safetensors, which have none, by name with numbers counted.
        source: name of the file.
        other: number of tensors without a row (vectors, scalars, integers).
        other_params: their entries.

    Example:
        >>> Inspection((inspect_tensor("w", torch.eye(4)),), "x.pt").rows[0].suggested[1]
        (0.1, 4)
    """

    rows: tuple[TensorRow, ...]
    source: str = ""
    other: int = 0
    other_params: int = 0

    def __str__(self) -> str:
        return self.table()

    @property
    def params(self) -> int:
        """Entries of all tensors of the file; tied ones count once."""
        return sum(row.params for row in self.rows if row.status != "tied") + self.other_params

    def table(self, *, width: int = 120) -> str:
        """Table as text, at most `width` columns; remarks on single tensors stand below it."""
        text = text_table(_COLUMNS, [_cells(row) for row in self.rows], width=width)
        lines = [printable(f"{self.source or 'inspect'}: {self._summary()}"), "", text]
        lines += ["", "(n): a rank in brackets needs more parameters than the matrix; >n: beyond the values computed"]
        notes = [f"  {shorten(printable(row.name), 40)}: {printable(row.note)}" for row in self.rows if row.note]
        return "\n".join(lines + ([""] + [shorten(note, width) for note in notes] if notes else []))

    def to_dict(self, *, spectra: bool = True) -> dict[str, Any]:
        """Plain dict that JSON can hold.

        Args:
            spectra: whether to include the singular values (they are most of the size).
        """
        rows = [
            {
                "name": row.name,
                "kind": row.kind,
                "shape": list(row.shape),
                "matrix": list(row.matrix),
                "dtype": row.dtype,
                "params": row.params,
                "status": row.status,
                "note": row.note,
                "method": row.method,
                "stable_rank": plain(row.stable_rank),
                "effective_rank": plain(row.effective_rank),
                "numerical_rank": row.numerical_rank,
                "break_even_rank": row.break_even_rank,
                "suggested": [{"error": tol, "rank": rank, "gains": row.gains(tol)} for tol, rank in row.suggested],
                "spectrum": [plain(value) for value in row.spectrum] if spectra else [],
            }
            for row in self.rows
        ]
        return {
            "kind": "tnlayers inspection",
            "version": 1,
            "source": self.source,
            "params": self.params,
            "other": self.other,
            "other_params": self.other_params,
            "rows": rows,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None, *, spectra: bool = True) -> str:
        """JSON text; also written to `path`, whole or not at all."""
        text = json.dumps(self.to_dict(spectra=spectra), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text)
        return text

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained page; also written to `path`, whole or not at all."""
        measured = [row for row in self.rows if row.status == "measured"]
        trouble = sum(row.status == "not finite" for row in self.rows)
        top = [
            ("Parameters", compact(self.params), f"{self.params:,} in {len(self.rows) + self.other} tensors"),
            ("Matrices", str(len(measured)), f"measured, of {len(self.rows)}"),
        ]
        for tol in TOLERANCES:
            before, after = self._factored(tol)
            share = f"{after / before:.1%}" if before else NOTHING
            top.append((f"At error {tol:g}", share, "of the matrices' parameters, where low rank gains"))
        if trouble:
            top.append(("Not finite", str(trouble), "tensors with NaN or infinity"))
        table = html_table(_COLUMNS, [_cells(row) for row in self.rows], caption="Tensors")
        sections = [("", tiles(top)), ("Tensors", table)]
        pictures = [_picture(row) for row in measured if row.spectrum]
        if pictures:
            sections.append(("Singular values", paragraph(_SPECTRUM_NOTE) + gallery(pictures)))
        text = html_page(f"inspect {self.source}".strip(), sections, lead=self._summary())
        if path is not None:
            write_atomic(path, text)
        return text

    def _summary(self) -> str:
        return (
            f"{len(self.rows)} matrices of {len(self.rows) + self.other} tensors, {self.params:,} parameters "
            f"({self.other_params:,} in vectors and others)"
        )

    def _factored(self, tol: float) -> tuple[int, int]:
        """Parameters of the measured matrices, and after factoring those that gain."""
        before = after = 0
        for row in self.rows:
            if row.status == "measured":
                before += row.params
                after += dict(row.suggested)[tol] * sum(row.matrix) if row.gains(tol) else row.params  # type: ignore
        return before, after


def inspect_file(
    path: str | os.PathLike[str], *, max_side: int = MAX_SIDE, progress: Progress | None = None
) -> Inspection:
    """Spectra and ranks of the weights in a safetensors file or a torch state dict; no code of the file is run.

    A checkpoint that holds its weights under "state_dict", "model_state_dict", "model" or "module" is unwrapped.
    Safetensors are read tensor by tensor, so that memory holds one of them at a time.

    Args:
        path: the file.
        max_side: matrices whose smaller side is larger (and above 1024) get 512 leading singular values only, and
            their row says so.
        progress: called with (done, total, name) before every tensor, and (total, total, "") at the end.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, a damaged file, a pickled module instead of its state dict, or no matrix in it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save(torch.nn.Linear(8, 4).state_dict(), path)
        >>> [row.name for row in inspect_file(path).rows]
        ['weight']
    """
    if max_side < 1:
        raise ValueError(f"inspect_file: max_side must be at least 1, got {max_side}")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"inspect_file: expected a file, got the folder {path}; name the .safetensors or .pt file")
    if not path.exists():
        raise FileNotFoundError(f"inspect_file: expected an existing file, got {path}")
    if not path.is_file():
        raise ValueError(f"inspect_file: expected a regular file, got {path}")
    rows: list[TensorRow] = []
    seen: dict[tuple[Any, ...], str] = {}
    other = other_params = 0
    with open_weights(path) as (names, read, together):
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names), name)
            x = read(name)
            if x.ndim < 2 or not (x.is_floating_point() or x.is_complex()):
                other, other_params = other + 1, other_params + x.numel()
                continue
            memory = _memory(x) if together else None  # read one by one, tensors reuse each other's memory
            if memory in seen:
                rows.append(_bare(name, x, "tied", f"the same memory as {seen[memory]}"))
                continue
            rows.append(inspect_tensor(name, x, max_side=max_side))
            if memory is not None:
                seen[memory] = name
        if progress is not None:
            progress(len(names), len(names), "")
    if not rows:
        raise ValueError(
            f"inspect_file: expected at least one floating tensor of order 2 or more in {path}, "
            f"got {other} vectors, scalars or integer tensors"
        )
    return Inspection(tuple(rows), path.name, other, other_params)


def inspect_tensor(name: str, x: Tensor, *, max_side: int = MAX_SIDE) -> TensorRow:
    """Row of one tensor; everything is computed in float64 whatever the dtype.

    Args:
        name: for the row.
        x: floating or complex, of order 2 or more; (m, n) is its first mode against the others.
        max_side: see `inspect_file`.

    Example:
        >>> row = inspect_tensor("w", torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])))
        >>> row.stable_rank, row.numerical_rank, row.break_even_rank
        (1.5, 3, 1)
    """
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        return _bare(name, x, "skipped", "not a dense tensor in memory (sparse, quantized or meta)")
    if x.numel() == 0:
        return _bare(name, x, "skipped", "empty")
    matrix = x.detach().reshape(x.shape[0], -1)
    if matrix.element_size() == 1:  # 8-bit floats have next to no operations of their own
        matrix = matrix.float()
    nans, infinities = int(matrix.isnan().sum()), int(matrix.isinf().sum())
    if nans or infinities:
        return _bare(name, x, "not finite", f"not finite: {nans} NaN and {infinities} infinite of {x.numel()} entries")
    m, n = matrix.shape
    largest = float(matrix.abs().max())
    even = (m * n - 1) // (m + n)
    if largest == 0:
        zero = tuple((tol, 0) for tol in TOLERANCES)
        values = (0.0,) * min(m, n, max_side)
        return _bare(name, x, "measured", "all zero", "svd", 0.0, 0.0, 0, even, zero, values)
    # Scaled, so that squares of very large or small entries stay in range.
    wide = matrix.mT if m > n else matrix
    method, s = _singular_values(wide, largest, max_side)
    whole = s.numel() == min(m, n)
    squares = s.square()
    total = float(squares.sum()) if whole else _square_norm(wide, largest)
    suggested = []
    for tol in TOLERANCES:
        # What is not among the leading values is discarded whatever the rank.
        budget = tol**2 * total - (0.0 if whole else max(0.0, total - float(squares.sum())))
        suggested.append((tol, truncation_rank(squares, budget, s.numel()) if budget >= 0 else None))
    effective = numerical = None
    note = ""
    if whole:
        p = s / s.sum()
        effective = float(torch.exp(torch.special.entr(p).sum()))
        noise = 2 * torch.finfo(x.dtype).eps * math.sqrt(total) * (1 / math.sqrt(m) + 1 / math.sqrt(n))
        resolved = float(s[0]) * (1e-7 if method == "gram" else max(m, n) * torch.finfo(torch.float64).eps)
        numerical = max(1, int((s > max(noise, resolved)).sum()))
    else:
        note = f"{s.numel()} leading of {min(m, n)} singular values, randomized: ranks are upper estimates"
    return _bare(
        name, x, "measured", note, method, total / float(squares[0]), effective, numerical, even, tuple(suggested),
        tuple((s * largest).tolist()),
    )  # fmt: skip


def _bare(name: str, x: Tensor, status: str, note: str, *measured: Any) -> TensorRow:
    shape = tuple(x.shape)
    matrix = (shape[0], math.prod(shape[1:]))
    dtype = str(x.dtype).removeprefix("torch.")
    return TensorRow(name, _kind(name, shape), shape, matrix, dtype, x.numel(), status, note, *measured)


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if re.search(r"(^|\.)cores\.\d+$", name):
        return "core"
    if len(shape) == 2:
        return "embedding" if re.search(r"emb|wte|wpe|tok_", name.lower()) else "matrix"
    return "kernel" if len(shape) <= 5 else "tensor"


def _singular_values(wide: Tensor, scale: float, max_side: int) -> tuple[str, Tensor]:
    """Method and descending singular values of `wide / scale`, m <= n, in float64."""
    m, n = wide.shape
    double = torch.complex128 if wide.is_complex() else torch.float64
    if m > max(max_side, 2 * LEADING):
        single = torch.complex64 if wide.is_complex() else torch.float32
        work = wide.to(single if 1e-30 < scale < 1e30 else double) / scale
        basis = randomized_basis(work, LEADING, generator=torch.Generator(work.device).manual_seed(0))
        return "leading", torch.linalg.svdvals((basis.mH @ work).to(double))[:LEADING]
    # A Gram matrix resolves singular values down to 1e-8 of the largest: enough for single precision, not for double.
    if wide.dtype not in (torch.float64, torch.complex128) and (2 * m <= n or m > SMALL):
        values = torch.linalg.eigvalsh(gram(wide) / scale**2)
        return "gram", values.flip(0).clamp_min(0).sqrt()
    return "svd", torch.linalg.svdvals(wide.to(double) / scale)


def _square_norm(matrix: Tensor, scale: float) -> float:
    """`‖A / scale‖_F²`, row block by row block in float64."""
    double = torch.complex128 if matrix.is_complex() else torch.float64
    return sum(float((block.to(double) / scale).abs().square().sum()) for block in matrix.split(256))


def _memory(x: Tensor) -> tuple[Any, ...] | None:
    """What identifies a view of memory; None where there is none to compare."""
    if x.layout != torch.strided or x.is_meta or x.numel() == 0:
        return None
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype


_SPECTRUM_NOTE = (
    "Relative to the largest, both axes logarithmic. The dashed line is the rank that keeps the relative error "
    "below 0.1; what lies to its right would be discarded."
)

_COLUMNS = (
    Column("tensor", "Name in the file.", flexible=True),
    Column("kind", "Matrix, embedding (judged by its name), kernel (unfolded as out x rest), core of a network."),
    Column("shape", "Shape as stored."),
    Column("dtype", "Type as stored; everything is computed in float64."),
    Column("params", "Number of entries.", numeric=True),
    Column("stable", "Stable rank: squared Frobenius norm over squared spectral norm.", numeric=True),
    Column("effective", "Effective rank: exponential of the entropy of the normalized singular values.", numeric=True),
    Column("num", "Numerical rank: singular values that rounding to the stored type cannot have made.", numeric=True),
    Column("even", "Break-even rank: the largest r with r (m + n) < m n, where two factors still hold less.", True),
    *(Column(f"at {t:g}", f"Smallest rank with a relative error of at most {t:g}.", numeric=True) for t in TOLERANCES),
    Column("method", "How the singular values were computed.", html_only=True),
    Column("note", "What else there is to say.", html_only=True),
)


def _cells(row: TensorRow) -> list[Cell]:
    suggested = dict(row.suggested)
    ranks = []
    for tol in TOLERANCES:
        rank, gains = suggested.get(tol), row.gains(tol)
        if rank is None:
            beyond = len(row.spectrum) if row.method == "leading" else None
            ranks.append(Cell(NOTHING if beyond is None else f">{beyond}", beyond, "quiet"))
        else:
            ranks.append(Cell(str(rank) if gains else f"({rank})", rank, "good" if gains else "quiet"))
    effective = Cell(number(row.effective_rank), row.effective_rank)
    if row.status != "measured":
        effective = Cell(row.status, None, "bad" if row.status == "not finite" else "quiet")
    whole = [row.numerical_rank, row.break_even_rank]
    return [
        Cell(row.name, row.name),
        Cell(row.kind, row.kind),
        Cell(shorten(by(row.shape), 16), row.params),
        Cell(row.dtype, row.dtype),
        Cell(compact(row.params), row.params),
        Cell(number(row.stable_rank), row.stable_rank),
        effective,
        *(Cell(NOTHING if value is None else str(value), value) for value in whole),
        *ranks,
        Cell(row.method or NOTHING, row.method or None),
        Cell(row.note, row.note or None, "wrap quiet"),
    ]


def _picture(row: TensorRow) -> tuple[str, str, str]:
    rank = dict(row.suggested).get(0.1)
    cuts = {} if rank is None else {"0": rank}
    figure = spectrum_figure({"0": row.spectrum}, cuts, **PAGE_FIGURE)  # type: ignore[arg-type]
    kept = "no rank known" if rank is None else f"rank {rank} of {min(row.matrix)}"
    alt = f"Singular values of {row.name}; {kept} keeps the relative error below 0.1."
    remark = f"{by(row.shape)}, {row.dtype}, stable rank {number(row.stable_rank)}"
    return row.name, remark, inline_image(figure_png(figure, transparent=True), alt)
