"""Every example runs, and says what it promises."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_in_its_quick_form(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = load(path).main(quick=True)
    assert result is not None
    assert capsys.readouterr().out.strip()


def test_tensorize_and_finetune_keeps_the_accuracy():
    pytest.importorskip("sklearn")
    result = load(EXAMPLES[0].parent / "tensorize_and_finetune.py").main(quick=True)
    assert result["kept"] < 0.12
    assert result["tuned"] > max(result["converted"], result["dense"] - 0.05)
