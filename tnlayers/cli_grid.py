"""The commands `tnlayers grid ...`: parse and print, no logic.

Exit codes are those of the other commands, and 3 where a target was missed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="grid",
    help="Compress grids (volumes, fields, arrays larger than memory), look into the result, decode parts of it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

MISSED = 3

COMPRESS_EXAMPLES = """[bold]Examples[/bold]

  tnlayers grid compress volume.npy --tol 0.05 --out small

  tnlayers grid compress scan.npz --name vol --format tt --psnr 35 --out small

  tnlayers grid compress field.zarr --bytes 1000000 --out small

  tnlayers grid compress field.zarr --method cross --tol 0.01 --max-bytes 200000000 --out small

The error is measured on the file as it is read back; where the target is missed the exit code is 3 and what was made is
kept as OUT.missed. A killed run leaves no half folder.
"""

DECODE_EXAMPLES = """[bold]Examples[/bold]

  tnlayers grid decode small --slice ":,:,90" --out slice.npy

  tnlayers grid decode small --stride 4 --dtype uint8 --out preview.npy

  tnlayers grid decode small --out whole.zarr --max-bytes 100000000
"""


@app.command(epilog=COMPRESS_EXAMPLES)
def compress(
    source: Annotated[str, typer.Argument(help=".npy .npz .zarr .h5 .nc .safetensors, or a folder of slices.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="tucker, tt or qtt.")] = "tucker",
    tol: Annotated[float | None, typer.Option(help="Relative error (Frobenius) to be met.")] = None,
    psnr: Annotated[float | None, typer.Option(help="Instead: dB over the range of the data.")] = None,
    bytes: Annotated[int | None, typer.Option(help="Instead: size of the file at most.")] = None,
    method: Annotated[str, typer.Option(help="auto, dense, gram, sketch or cross.")] = "auto",
    coding: Annotated[str, typer.Option(help="Of cores: planes, int8 or none (float32).")] = "planes",
    name: Annotated[str | None, typer.Option(help="Array in a file that holds several.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cap of every bond.")] = None,
    order: Annotated[str, typer.Option(help="Of the digits of qtt: auto, C, F or interleaved.")] = "auto",
    max_evals: Annotated[int | None, typer.Option(help="Of a cross: entries at most.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Of a cross: bytes read at most.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Of a cross: seconds at most.")] = None,
    fill_value: Annotated[float | None, typer.Option(help="Stored number that means missing.")] = None,
    missing: Annotated[float | None, typer.Option(help="Value of missing entries; else they are refused.")] = None,
    background: Annotated[float, typer.Option(help="Value that is not foreground.")] = 0.0,
    verify: Annotated[str, typer.Option(help="auto, full, sample, or a number of entries.")] = "auto",
    memory: Annotated[int, typer.Option(help="Bytes of a grid that method auto reads whole.")] = 1 << 30,
    cache: Annotated[int, typer.Option(help="Bytes of chunks that are kept.")] = 1 << 28,
    seed: Annotated[int, typer.Option(help="Of samples and sketches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a grid in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compress a grid to a target that is verified on the written file."""
    from tnlayers.cli import REFUSED, _fail, _guard, _print_json, _teller

    def work() -> None:
        from tnlayers.grids.compress import GridConfig, TargetMissed, run

        config = GridConfig(
            source, out, format=format, tol=tol, psnr=psnr, bytes=bytes, method=method, coding=coding, name=name,
            rank=rank, order=order, max_evals=max_evals, max_bytes=max_bytes, max_seconds=max_seconds,
            fill_value=fill_value, missing=missing, background=background, verify=verify, memory=memory, cache=cache,
            seed=seed, overwrite=overwrite,
        )  # fmt: skip
        try:
            with _teller(quiet) as tell:
                result = run(config, tell)
        except TargetMissed as error:
            _fail(str(error), MISSED)
        if as_json:
            _print_json(result.to_dict())
        else:
            typer.echo(result.text())
            typer.echo(f"\n{result.folder} written, with report.html, in {sum(result.seconds.values()):.0f} s")

    _guard(work, "interrupted; nothing was written", REFUSED)


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="A folder that grid compress wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Shape, ranks, size, errors promised and measured, entries and bytes read."""
    from tnlayers.cli import REFUSED, _guard, _print_json

    def work() -> None:
        from tnlayers.grids import info as room

        if as_json:
            _print_json(room.info(folder))
        else:
            from tnlayers.grids.store import load_grid

            grid = load_grid(folder)
            typer.echo(room.describe(grid, grid.about))

    _guard(work, "interrupted", REFUSED)


@app.command(epilog=DECODE_EXAMPLES)
def decode(
    folder: Annotated[Path, typer.Argument(help="A folder that grid compress wrote.")],
    out: Annotated[Path, typer.Option(help=".npy file or .zarr folder to write.")],
    slice: Annotated[str | None, typer.Option(help="numpy's notation: 10:20,:,5")] = None,
    stride: Annotated[str | None, typer.Option(help="A number, or one an axis: every k-th entry of the slice.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the array; integers are rounded and clipped.")] = "float32",
    max_bytes: Annotated[int, typer.Option(help="Of decoded values held at once.")] = 1 << 26,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Decode a grid or a part of it, block by block."""
    from tnlayers.cli import REFUSED, _guard, _teller

    def work() -> None:
        from tnlayers.grids.info import DecodeConfig
        from tnlayers.grids.info import decode as run
        from tnlayers.page import by

        config = DecodeConfig(folder, out, slice, stride, dtype, max_bytes, overwrite)
        with _teller(quiet) as tell:
            file, shape = run(config, tell)
        typer.echo(f"{file} written, {by(shape)} {dtype}")

    _guard(work, "interrupted; nothing was written", REFUSED)


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="A folder that grid compress wrote.")],
    source: Annotated[str | None, typer.Argument(help="The original; by default what the folder says.")] = None,
    name: Annotated[str | None, typer.Option(help="Array in a file that holds several.")] = None,
    fill_value: Annotated[float | None, typer.Option(help="Stored number that means missing.")] = None,
    missing: Annotated[float | None, typer.Option(help="Value of missing entries.")] = None,
    background: Annotated[float, typer.Option(help="Value that is not foreground.")] = 0.0,
    entries: Annotated[int | None, typer.Option(help="Compared, drawn at random; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """PSNR, relative error, foreground PSNR and largest error against the original."""
    from tnlayers.cli import REFUSED, _guard, _print_json, _teller

    def work() -> None:
        from tnlayers.grids.info import CompareConfig
        from tnlayers.grids.info import compare as run

        config = CompareConfig(
            folder,
            source,
            name,
            fill_value=fill_value,
            missing=missing,
            background=background,
            entries=entries,
            seed=seed,
        )
        with _teller(quiet) as tell:
            found = run(config, tell)
        if as_json:
            _print_json(found.to_dict())
        else:
            typer.echo(found.text())

    _guard(work, "interrupted", REFUSED)
