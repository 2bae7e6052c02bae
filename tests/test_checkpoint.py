"""Files: round trips, ties, the meta device, damage refused by name, and no half-written file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, svd, ttm_svd, tucker2
from decompositions import round as cut
from tnlayers.layer import NetworkLayer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 32)
        self.out = nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).mT)).mT
        return self.head(self.out(torch.relu(self.fc(x))))


def tensorized() -> Net:
    torch.manual_seed(0)
    model = Net()
    recipes = {
        "embed": partial(ttm_svd, order=2, rank=3),
        "head": partial(ttm_svd, order=2, rank=3),
        "conv": partial(tucker2, rank=4),
        "fc": partial(svd, rank=3),
    }
    report = tnlayers.tensorize(model, recipes)
    assert sum(row.status == "converted" for row in report.rows) == 4
    return model.eval()


TOKENS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip_into_a_dense_instance(tmp_path, device):
    model = tensorized()
    file = tnlayers.save(model, tmp_path / "net")
    assert file.name == "net.safetensors"
    with torch.device(device):
        fresh = Net()
    again = tnlayers.load(file, fresh).eval()
    assert again is fresh
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert repr(again.conv) == repr(model.conv)
    assert all(a is b for a, b in zip(again.embed.cores, again.head.cores, strict=True))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    again(TOKENS).sum().backward()


def test_round_trip_into_a_tensorized_instance_of_other_ranks(tmp_path):
    model, other = tensorized(), tensorized()
    other.fc.set_network(cut(other.fc.network, rank=1))
    file = tnlayers.save(model, tmp_path / "net")
    again = tnlayers.load(file, other).eval()
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.fc.network.ranks == (3, 3)
    again.load_state_dict(tensorized().state_dict())


def test_dense_models_and_single_layers(tmp_path):
    dense = Net().eval()
    again = tnlayers.load(tnlayers.save(dense, tmp_path / "dense"), Net()).eval()
    assert torch.equal(again(TOKENS), dense(TOKENS))
    assert again.head.weight is again.embed.weight
    layer = tnlayers.Linear(8, 4, network=tnlayers.random_network(LowRank, rank=2))
    loaded = tnlayers.load(tnlayers.save(layer, tmp_path / "one"), nn.Linear(8, 4))
    assert torch.equal(loaded(torch.ones(1, 8)), layer(torch.ones(1, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_dtypes_come_from_the_file(tmp_path, dtype):
    make = tnlayers.random_network(TTMatrix, rank=3, order=2)
    model = nn.Sequential(tnlayers.Linear(12, 10, network=make, dtype=dtype))
    again = tnlayers.load(tnlayers.save(model, tmp_path / "net"), nn.Sequential(nn.Linear(12, 10)))
    assert again[0].network.dtype == dtype
    x = torch.ones(2, 12, dtype=dtype)
    assert torch.equal(again(x), model(x))


def test_files_are_small_plain_and_tied_tensors_are_stored_once(tmp_path):
    model = tensorized()
    file = tnlayers.save(model, tmp_path / "net")
    stored = load_file(file)
    assert not any(key.startswith("head.") for key in stored)
    once = {id(t): t.numel() for t in (*model.parameters(), *model.buffers())}
    assert sum(t.numel() for t in stored.values()) == sum(once.values())
    plan = json.loads(Path(f"{file}.json").read_text())
    assert plan["layers"]["embed"]["format"] == "TTMatrix"
    assert plan["ties"] == {"head.cores.0": "embed.cores.0", "head.cores.1": "embed.cores.1"}


def test_channels_last_and_views_are_stored(tmp_path):
    base = torch.randn(4, 4)
    model = nn.Module()
    model.a = nn.Parameter(base)
    model.b = nn.Parameter(base[:2])
    model.c = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    other = nn.Module()
    other.a, other.b, other.c = (nn.Parameter(torch.zeros(s)) for s in ((4, 4), (2, 4), (2, 3, 4, 4)))
    again = tnlayers.load(tnlayers.save(model, tmp_path / "net"), other)
    for key in "abc":
        assert torch.equal(getattr(again, key), getattr(model, key))


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    model = tensorized()
    file = tnlayers.save(model, tmp_path / "net")
    good = file.read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tnlayers.load(tmp_path / "nowhere.safetensors", Net())
    for broken in (good[:100], good[: len(good) // 2], b"", os.urandom(2000), b"\x00" * 64):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"net\.safetensors is not a readable"):
            tnlayers.load(file, Net())
    flipped = good.replace(b'\\"rows\\"', b'\\"rowz\\"', 1)
    assert flipped != good
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match="checksum"):
        tnlayers.load(file, Net())
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no tnlayers structure"):
        tnlayers.load(file, Net())


def test_models_that_do_not_fit_are_refused_and_left_alone(tmp_path):
    file = tnlayers.save(tensorized(), tmp_path / "net")
    biased = Net()
    biased.fc = nn.Linear(16, 32, bias=False)
    wide = Net()
    wide.fc = nn.Linear(16, 33)
    for model, message in (
        (nn.Linear(2, 2), "layer 'conv' .* must exist"),
        (nn.ModuleDict({"conv": nn.Linear(2, 2)}), "Conv1d layer, got Linear"),
        (wide, r"rows >= 33"),
        (biased, "bias=True"),
    ):
        before = str(model)
        with pytest.raises(ValueError, match=message):
            tnlayers.load(file, model)
        assert str(model) == before
    extra = Net()
    extra.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing \['more.bias', 'more.weight'\]"):
        tnlayers.load(file, extra)
    assert isinstance(extra.fc, nn.Linear)


def test_an_unknown_format_is_refused(tmp_path):
    file = tnlayers.save(tensorized(), tmp_path / "net")
    plan = json.loads(Path(f"{file}.json").read_text())
    plan["layers"]["fc"]["format"] = "os.system"
    text = json.dumps(plan)
    import hashlib

    save_file(load_file(file), file, metadata={"tnlayers": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    with pytest.raises(ValueError, match=r"'os.system', expected one of .*LowRank"):
        tnlayers.load(file, Net())


def test_save_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="a folder that exists"):
        tnlayers.save(nn.Linear(2, 2), tmp_path / "no" / "where")
    with pytest.raises(ValueError, match="meta device"):
        tnlayers.save(nn.Linear(2, 2, device="meta"), tmp_path / "net")


def test_non_persistent_buffers_of_a_meta_model_are_named(tmp_path):
    class WithBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("table", torch.ones(3), persistent=False)

    file = tnlayers.save(WithBuffer(), tmp_path / "net")
    with torch.device("meta"):
        model = WithBuffer()
    with pytest.raises(ValueError, match="table"):
        tnlayers.load(file, model)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    """Save over and over in a child, kill it at different moments: what lies there always loads."""
    script = textwrap.dedent(
        """
        import sys, torch, tnlayers
        from torch import nn
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Linear(700, 700))
        tnlayers.save(model, sys.argv[1])
        print("ready", flush=True)
        while True:
            with torch.no_grad():
                model[0].weight.fill_(float(torch.rand(())))
            tnlayers.save(model, sys.argv[1])
        """
    )
    file = tmp_path / "net.safetensors"
    for delay in (0.0, 0.013, 0.031):
        child = subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.05 + delay)
        child.kill()
        child.wait()
        child.stdout.close()
        weight = tnlayers.load(file, nn.Sequential(nn.Linear(700, 700)))[0].weight
        assert len(weight.unique()) == 1 or float(weight.detach().abs().max()) <= 1


def test_layers_of_every_kind_round_trip(tmp_path):
    make = partial(tnlayers.random_network, Tucker, 3)
    model = nn.Sequential(
        tnlayers.Conv1d(4, 6, 3, network=make()),
        tnlayers.Conv2d(4, 6, 3, network=make()),
        tnlayers.Conv3d(4, 6, 3, network=make()),
        tnlayers.Linear(6, 5, network=make()),
        tnlayers.Embedding(9, 5, padding_idx=2, network=make()),
        tnlayers.EmbeddingBag(9, 5, mode="max", padding_idx=2, network=make()),
        tnlayers.ConvTranspose1d(4, 6, 3, stride=2, network=make()),
        tnlayers.ConvTranspose2d(4, 6, 3, stride=2, output_padding=(1, 0), network=make()),
        tnlayers.ConvTranspose3d(4, 6, 3, groups=2, network=make()),
    )
    fresh = nn.Sequential(
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3),
        nn.Conv3d(4, 6, 3),
        nn.Linear(6, 5),
        nn.Embedding(9, 5, padding_idx=2),
        nn.EmbeddingBag(9, 5, mode="max", padding_idx=2),
        nn.ConvTranspose1d(4, 6, 3, stride=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=(1, 0)),
        nn.ConvTranspose3d(4, 6, 3, groups=2),
    )
    again = tnlayers.load(tnlayers.save(model, tmp_path / "net"), fresh)
    for own, other in zip(model, again, strict=True):
        assert isinstance(other, NetworkLayer)
        assert torch.equal(own.weight, other.weight)


def test_settings_are_compared(tmp_path):
    make = tnlayers.random_network(LowRank, rank=2)
    strided = nn.Sequential(tnlayers.Conv2d(4, 6, (3, 1), stride=2, network=make))
    file = tnlayers.save(strided, tmp_path / "net")
    for model, message in (
        (nn.Conv2d(4, 6, (3, 1)), r"stride=\[2, 2\] \(model: \[1, 1\]\)"),
        (nn.Conv2d(4, 6, (1, 3), stride=2), r"kernel_size=\[3, 1\] \(model: \[1, 3\]\)"),
        (nn.Conv2d(4, 6, (3, 1), stride=2, padding=1), "padding"),
    ):
        with pytest.raises(ValueError, match=message):
            tnlayers.load(file, nn.Sequential(model))


def test_names_never_collide(tmp_path):
    """A sidecar never overwrites the weights or somebody's config.json; dots in names are kept."""
    (tmp_path / "config.json").write_text("mine")
    model = nn.Sequential(tnlayers.Linear(4, 4, network=tnlayers.random_network(LowRank, rank=1)))
    names = {tnlayers.save(model, tmp_path / name).name for name in ("config", "net.json", "m.v1", "m.v2")}
    assert names == {"config.safetensors", "net.json.safetensors", "m.v1.safetensors", "m.v2.safetensors"}
    assert (tmp_path / "config.json").read_text() == "mine"
    for name in ("config", "net.json", "m.v1", "m.v2.safetensors"):
        tnlayers.load(tmp_path / name, nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        tnlayers.load(tmp_path, nn.Sequential(nn.Linear(4, 4)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(16, 16))
        self.b = self.a


def test_shared_modules_load_back(tmp_path):
    model = Shared()
    tnlayers.tensorize(model, partial(svd, rank=2))
    again = tnlayers.load(tnlayers.save(model, tmp_path / "net"), Shared())
    assert again.a is again.b
    assert torch.equal(again.b[0].weight, model.a[0].weight)


def test_flipped_bits_and_conjugate_views(tmp_path):
    model = nn.Sequential(tnlayers.Linear(16, 16, network=tnlayers.random_network(LowRank, rank=4)))
    file = tnlayers.save(model, tmp_path / "net")
    good = bytearray(file.read_bytes())
    numbers = 8 + int.from_bytes(good[:8], "little")
    for position in range(numbers, len(good), 37):  # nothing else would notice it there
        bad = good.copy()
        bad[position] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="checksum"):
            tnlayers.load(file, nn.Sequential(nn.Linear(16, 16)))
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64).conj())
    other = nn.Module()
    other.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    again = tnlayers.load(tnlayers.save(plain, tmp_path / "conj"), other)
    assert torch.equal(again.weight, plain.weight)
    plain.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(ValueError, match="complex128"):
        tnlayers.save(plain, tmp_path / "wide")
