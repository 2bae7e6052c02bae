"""Calibration against the activations themselves, and everything that can go wrong on the way."""

import copy
import sys

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.compression.calibration import Calibration, GradientGram, Uses

F64 = torch.float64


class Attention(nn.Module):
    """One head; queries, keys and values are handed the same tensor, which is overwritten afterwards."""

    def __init__(self, width=6, inplace=False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.inplace = inplace

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.inplace:
            with torch.no_grad():
                x.mul_(1000)
        return self.o(torch.softmax(q @ k.mT, -1) @ v)


class Encoder(nn.Module):
    def __init__(self, width=6, inplace=False):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.attention = Attention(width, inplace)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids) * 1.0
        return self.head(torch.tanh(self.attention(x)))


def model(seed=0, **options):
    torch.manual_seed(seed)
    return Encoder(**options).double()


def texts(seed=0, count=3, width=5):
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 11, (4, width), generator=rng)
        mask = torch.arange(width)[None, :] < torch.randint(1, width + 1, (4, 1), generator=rng)
        made.append({"input_ids": ids, "attention_mask": mask.long()})
    return made


def truth(net, batches, name):
    """Inputs of a layer at the tokens that count."""
    seen = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
    with torch.no_grad():
        for batch in batches:
            net(**batch)
    handle.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)])


def gram(factor):
    return factor.mT @ factor


@pytest.mark.parametrize("inplace", [False, True])
def test_factors_are_those_of_the_tokens_that_count(inplace):
    net, batches = model(inplace=inplace), texts()
    held = tnlayers.collect(net, batches, dtype=F64)
    for name in ("attention.q", "attention.k", "attention.o", "head"):
        x = truth(net, batches, name)
        layer = held.layers[name]
        assert layer.tokens == len(x) == sum(int(b["attention_mask"].sum()) for b in batches)
        assert torch.allclose(gram(layer.inputs.factor), x.mT @ x, rtol=1e-12, atol=1e-12 * float(x.square().sum()))
    assert held.layers["attention.q"].inputs is held.layers["attention.v"].inputs
    assert held.layers["attention.q"].inputs is not held.layers["attention.o"].inputs
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in batches])
    assert torch.equal(held.layers["embed"].inputs.counts, torch.bincount(ids, minlength=11).double())


def test_nothing_of_the_model_changes():
    net, batches = model(), texts()
    net.train()
    net.head.eval()
    net.embed.weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = copy.deepcopy(net.state_dict())
    wanted = net(**batches[0])
    tnlayers.collect(net, batches, gradients=True, outputs=True)
    assert torch.equal(net(**batches[0]), wanted)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert not net.head.training
    assert not net.embed.weight.requires_grad
    assert net.attention.q.weight.requires_grad
    assert net.attention.q.weight.grad is None
    assert bool((net.head.weight.grad == 1).all())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_hooks_go_even_when_the_model_fails():
    net, batches = model(), texts()
    batches[1]["input_ids"] = batches[1]["input_ids"] + 100
    with pytest.raises(ValueError, match=r"collect: embed: .* 0\.\.10, got 1\d\d; is it the model's own tokenizer"):
        tnlayers.collect(net, batches, gradients=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_layers_share_a_factor_only_while_they_see_the_same():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x, apart):
            y = self.a(x) + self.b(x + 1 if apart else x)
            return y + (0 if apart else self.c(x))

    net = Fickle().double()
    xs = [torch.randn(7, 3, dtype=F64) for _ in range(4)]
    held = tnlayers.collect(net, [(x, k in (1, 2)) for k, x in enumerate(xs)], dtype=F64)
    all_, moved = torch.cat(xs), torch.cat([xs[0], xs[1] + 1, xs[2] + 1, xs[3]])
    some = torch.cat([xs[0], xs[3]])
    for name, x in (("a", all_), ("b", moved), ("c", some)):
        assert held.layers[name].tokens == len(x)
        assert torch.allclose(gram(held.layers[name].inputs.factor), x.mT @ x, atol=1e-11)


def test_a_shared_layer_counts_all_its_calls():
    layer = nn.Linear(3, 3).double()
    net = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(9, 3, dtype=F64)
    held = tnlayers.collect(net, [x], dtype=F64)
    both = torch.cat([x, torch.tanh(layer(x)).detach()])
    assert torch.allclose(gram(held.layers["0"].inputs.factor), both.mT @ both, atol=1e-12)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 11)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (5, 4, 8, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), (5, 4, 8, 9)),
        (nn.Conv2d(4, 6, 3, padding="same"), (4, 8, 9)),
        (nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 4, 4, 4)),
    ],
)
def test_a_kernel_sees_its_patches(conv, shape):
    conv = conv.double()
    x = torch.randn(*shape, dtype=F64)
    held = tnlayers.collect(nn.Sequential(conv), [x], dtype=F64)
    factor = held.layers["0"].inputs.factor
    # the energy of what the kernel makes of its patches is that of its output without bias
    y = conv(x) - conv.bias.reshape(-1, *[1] * len(conv.kernel_size))
    if conv.groups == 1:
        energy = (conv.weight.flatten(1) @ factor.mT).square().sum()
        assert torch.allclose(energy, y.square().sum(), rtol=1e-11)
        delta = torch.randn_like(conv.weight)
        other = copy.deepcopy(conv)
        other.weight.data += delta
        assert torch.allclose((delta.flatten(1) @ factor.mT).norm(), (other(x) - conv(x)).norm(), rtol=1e-11)
    assert held.layers["0"].tokens == y.numel() // 6 * conv.groups if conv.weight.shape[0] == 6 else True


def test_big_kernels_are_counted_in_parts(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    x = torch.randn(6, 3, 7, 7, dtype=F64)
    whole = tnlayers.collect(net, [x], dtype=F64).layers["0"].inputs.factor
    monkeypatch.setattr(sys.modules["tnlayers.compression.collect"], "ENTRIES", 1)
    parts = tnlayers.collect(net, [x], dtype=F64).layers["0"].inputs.factor
    assert torch.allclose(gram(whole), gram(parts), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_predict_what_a_small_change_of_a_weight_does(seed):
    """E over v of (g . dy)^2, summed over what depends on each other, is ‖dz‖^2: here every token is alone."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(4000, 5, dtype=F64)
    held = tnlayers.collect(net, x.split(400), gradients=True, dtype=F64, seed=seed)
    assert held.power == pytest.approx(float(net(x).detach().square().sum()), rel=1e-6)
    g = held.layers["0"].gradients.factor
    inner = torch.tanh(net[0](x)).detach()
    jacobian = net[2].weight[None] * (1 - inner.square())[:, None, :]
    exact = torch.einsum("boi,boj->ij", jacobian, jacobian).detach()
    assert float((gram(g) - exact).norm() / exact.norm()) < 0.1  # 4000 draws


def test_logits_are_probed_by_labels_of_the_model():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.fc(x)} if False else type("Out", (), {"logits": self.fc(x)})()

    torch.manual_seed(0)
    net, x = Classifier().double(), torch.randn(6000, 4, dtype=F64)
    held = tnlayers.collect(net, x.split(1000), gradients=True, dtype=F64)
    p = torch.softmax(net.fc(x), -1).detach()
    fisher = torch.diag(p.sum(0)) - p.mT @ p
    assert held.power == 6000
    assert float((gram(held.layers["fc"].gradients.factor) - fisher).norm() / fisher.norm()) < 0.05


def test_what_is_preserved_can_be_a_loss_or_anything():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(20, 4, dtype=F64), torch.randint(0, 3, (20,))
    held = tnlayers.collect(
        net, [x], gradients=lambda out, batch: nn.functional.cross_entropy(out, y, reduction="sum"), dtype=F64
    )
    g = torch.softmax(net(x), -1).detach() - nn.functional.one_hot(y, 3)
    assert torch.allclose(gram(held.layers["0"].gradients.factor), g.mT @ g, atol=1e-12)
    with pytest.raises(ValueError, match="must depend on the layers"):
        tnlayers.collect(net, [x], gradients=lambda out, batch: torch.zeros(3))


def test_an_output_that_is_overwritten_still_has_its_gradient():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    other = nn.Sequential(net[0], nn.ReLU(), net[2])
    x = torch.randn(30, 4, dtype=F64)
    one, two = (tnlayers.collect(n, [x], gradients=True, dtype=F64) for n in (net, other))
    assert torch.equal(one.layers["0"].gradients.factor, two.layers["0"].gradients.factor)


def test_modes():
    net, batches = model(), texts()
    x = truth(net, batches, "head")
    held = tnlayers.collect(net, batches, mode="diagonal")
    assert torch.allclose(held.layers["head"].inputs.squares, x.square().sum(0))
    assert torch.allclose(held.layers["head"].inputs.magnitudes, x.abs().sum(0))
    held = tnlayers.collect(net, batches, mode="none", gradients=True)
    assert held.layers["head"].inputs is None
    assert held.layers["head"].gradients is not None
    assert held.layers["head"].tokens > 0
    held = tnlayers.collect(net, batches, wide=4, gradients=True, dtype=F64)
    assert torch.allclose(held.layers["head"].inputs.squares, x.square().sum(0))
    assert held.layers["head"].gradients.factor.shape == (3, 3)
    outputs = tnlayers.collect(net, batches, outputs=True, dtype=F64).layers["head"].outputs
    y = net.head(x).detach()
    assert torch.allclose(gram(outputs.factor), y.mT @ y, atol=1e-10)


def test_chunks_and_order_do_not_matter():
    net = model()
    ids = torch.randint(0, 11, (24, 5), generator=torch.Generator().manual_seed(0))
    whole = tnlayers.collect(net, [{"input_ids": ids}], dtype=F64)
    parts = tnlayers.collect(net, [{"input_ids": p} for p in reversed(ids.split(5))], dtype=F64)
    for name in ("attention.q", "attention.o", "head"):
        a, b = (gram(held.layers[name].inputs.factor) for held in (whole, parts))
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * float(a.norm()))


def test_a_file_holds_all_of_it(tmp_path):
    net, batches = model(), texts()
    held = tnlayers.collect(net, batches, gradients=True, outputs=True)
    again = Calibration.load(held.save(tmp_path / "held.safetensors"))
    assert again.layers["attention.q"].inputs is again.layers["attention.k"].inputs
    assert (again.mode, again.batches, again.power) == (held.mode, held.batches, held.power)
    for name, layer in held.layers.items():
        mine = again.layers[name]
        assert (layer.kind, layer.tokens) == (mine.kind, mine.tokens)
        for (part, a), (other, b) in zip(layer.parts(), mine.parts(), strict=True):
            assert part == other
            assert a.count == b.count
            left, right = (s.counts if isinstance(s, Uses) else s.factor for s in (a, b))
            assert torch.equal(left, right)
    assert "attention.q: matrix" in str(again)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file"):
        Calibration.load(tmp_path / "none")
    file = tnlayers.collect(model(), texts()).save(tmp_path / "held.safetensors")
    content = file.read_bytes()
    for broken in (
        content[: len(content) // 2],
        b"",
        content.replace(b"tnlayers calibration", b"tnlayers_calibration"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read"):
            Calibration.load(file)
    with pytest.raises(ValueError, match="folder that exists"):
        Calibration().save(tmp_path / "no" / "file")


@pytest.mark.parametrize("killed", [1, 2, 4, 5])
def test_a_killed_collection_goes_on_bit_for_bit(tmp_path, killed):
    net, batches, file = model(), texts(count=6), tmp_path / "held.safetensors"

    def stop(done, total, text):
        if done == killed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tnlayers.collect(net, batches, gradients=True, checkpoint=file, every=2, progress=stop)
    seen = []
    again = tnlayers.collect(
        net, batches, gradients=True, checkpoint=file, every=2, progress=lambda done, total, text: seen.append(done)
    )
    assert seen[0] == killed // 2 * 2 + 1 if killed % 2 else seen[0] == killed - 1
    whole = tnlayers.collect(net, batches, gradients=True)
    for name, layer in whole.layers.items():
        for (_, a), (_, b) in zip(layer.parts(), again.layers[name].parts(), strict=True):
            left, right = (s.counts if isinstance(s, Uses) else s.factor for s in (a, b))
            assert torch.equal(left, right)
    assert whole.power == again.power
    seen.clear()
    tnlayers.collect(
        net, batches, gradients=True, checkpoint=file, progress=lambda done, total, text: seen.append(done)
    )
    assert seen == []  # finished
    with pytest.raises(ValueError, match="same layers and mode"):
        tnlayers.collect(net, batches, mode="diagonal", checkpoint=file)
    with pytest.raises(ValueError, match="expected 'other texts', got ''"):
        tnlayers.collect(net, batches, checkpoint=file, source="other texts")


def test_merged_calibrations_are_one():
    net, batches = model(), texts(count=4)
    whole = tnlayers.collect(net, batches, outputs=True, dtype=F64)
    first, second = (tnlayers.collect(net, part, outputs=True, dtype=F64) for part in (batches[:1], batches[1:]))
    untouched = first.layers["head"].inputs.factor.clone()
    other = copy.deepcopy(second)
    first.merge(second)
    for name, layer in whole.layers.items():
        assert first.layers[name].tokens == layer.tokens
        for (_, a), (_, b) in zip(layer.parts(), first.layers[name].parts(), strict=True):
            left, right = (s.counts if isinstance(s, Uses) else gram(s.factor) for s in (a, b))
            assert torch.allclose(left, right, atol=1e-10)
    assert first.batches == 4
    assert torch.equal(second.layers["head"].inputs.factor, other.layers["head"].inputs.factor)
    assert not torch.equal(untouched, first.layers["head"].inputs.factor)
    assert first.layers["attention.q"].inputs is first.layers["attention.k"].inputs
    with pytest.raises(ValueError, match="same layers and mode"):
        first.merge(tnlayers.collect(net, batches, "head"))
    with pytest.raises(ValueError, match="same statistics"):
        first.merge(tnlayers.collect(net, batches))


def test_bad_activations_are_named():
    net, batches = model(), texts()
    net.attention.v.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"collect: attention\.o: .*NaN"):
        tnlayers.collect(net, batches)
    net = model()
    net.head.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"preserved must be finite"):
        tnlayers.collect(net, batches, gradients=True)


def test_bad_input_is_refused():
    net, batches = model(), texts()
    for arguments, message in (
        (([],), "at least one batch"),
        ((batches, "decoder.*"), "every pattern must match"),
        ((batches, None, "gram"), "mode must be one of"),
        ((["text"],), "a tensor, a sequence or a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            tnlayers.collect(net, *arguments)
    for one in (batches[0], torch.zeros(3)):
        with pytest.raises(TypeError, match="put it in a list"):
            tnlayers.collect(net, one)
    with pytest.raises(ValueError, match="must have a layer"):
        tnlayers.collect(nn.Sequential(nn.ReLU()), [torch.zeros(3)])


def test_quantized_layers_are_refused_by_name():
    class Int8Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 3, 3
            self.register_buffer("weight", torch.zeros(3, 3, dtype=torch.int8))

    net = nn.Sequential(nn.Linear(3, 3), Int8Linear())
    with pytest.raises(ValueError, match=r"got quantized ones: 1; dequantize"):
        tnlayers.collect(net, [torch.zeros(2, 3)])
    assert tnlayers.collect(nn.Sequential(net[0]), [torch.zeros(2, 3)], "0").layers.keys() == {"0"}


def test_half_precision_models_are_counted_in_single():
    net = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    x = torch.randn(10, 4).bfloat16()
    factor = tnlayers.collect(net, [x], gradients=True).layers["0"].inputs.factor
    assert factor.dtype == torch.float32
    assert torch.allclose(gram(factor), x.float().mT @ x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_unseen_rows_get_their_expected_share(seed):
    """Good and Turing: what rows without a use weigh together is near what they weigh in new text."""
    rng = torch.Generator().manual_seed(seed)
    p = 1 / torch.arange(1, 2001, dtype=F64)
    p /= p.sum()
    held = Uses(2000)
    held.add(torch.bincount(torch.multinomial(p, 3000, True, generator=rng), minlength=2000).double())
    assert float(held.smoothed.sum()) == pytest.approx(3000)
    unseen = held.counts == 0
    assert float(held.smoothed[unseen].sum()) / 3000 == pytest.approx(float(p[unseen].sum()), rel=0.25)
    assert bool((held.smoothed > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_gradients_of_any_rank_and_size_have_a_factor(dtype, rank, size, rng):
    g = (torch.randn(300, rank, generator=rng) @ torch.randn(rank, 40, generator=rng)).to(dtype) * size
    held = GradientGram(40, dtype=dtype)
    held.update(g[:100])
    held.update(g[100:].reshape(10, 20, 40), torch.ones(10, 20, dtype=torch.bool))
    again = GradientGram.from_state(held.state())
    factor = again.factor
    assert factor.dtype == dtype
    exact = g.double().mT @ g.double()
    wrong = float((gram(factor.double()) - exact).norm() / exact.norm())
    assert wrong < (1e-3 if dtype == torch.float32 else 1e-10)
    held.merge(again)
    assert held.count == 600
    assert torch.allclose(held.gram, 2 * again.gram)
    with pytest.raises(ValueError, match="finite"):
        held.update(g * float("nan"))
    assert not bool(GradientGram(3).factor.any())
