"""Calibration where it is easily wrong in silence: masks, modes, recomputation, fused kernels, lazy models."""

import pytest
import torch
from test_collect import gram, model, texts
from torch import nn

import tnlayers
from decompositions.weighted import CalibrationWarning


class Bare(nn.Module):
    """A table and a matrix; a mask that only the calibration reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids, attention_mask=None):
        return self.fc(self.embed(ids))


def test_masks_that_do_not_say_which_tokens_count_are_refused():
    ids = torch.randint(0, 9, (2, 5))
    for mask in (torch.ones(2, 1, 5, 5), torch.tensor([[0.0] * 5, [-1e9] * 5]), torch.full((2, 5), 2), torch.ones(10)):
        batch = {"ids": ids, "attention_mask": mask}
        with pytest.raises(ValueError, match=r"collect: attention_mask must be \(batch, tokens\) of zeros and ones"):
            tnlayers.collect(Bare(), [batch])
        assert tnlayers.collect(Bare(), [batch], mask="").layers["fc"].tokens == 10
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for mask in (left, left.bool(), left.float()):
        assert tnlayers.collect(Bare(), [{"ids": ids, "attention_mask": mask}]).layers["fc"].tokens == 8


@pytest.mark.parametrize("options", [{}, {"gradients": True}, {"mode": "diagonal"}, {"mode": "none"}])
def test_no_token_at_all_is_said(options):
    ids = torch.zeros(2, 3, dtype=torch.long)
    for batch in ({"ids": ids, "attention_mask": torch.zeros(2, 3)}, {"ids": ids[:0]}):
        with pytest.warns(CalibrationWarning, match="no layer saw a token that counts"):
            held = tnlayers.collect(Bare(), [batch], **options)
        assert {layer.tokens for layer in held.layers.values()} == {0}
    assert tnlayers.collect(Bare(), [batch, {"ids": ids}], **options).layers["fc"].tokens == 6


def test_empty_batches_of_kernels_count_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 5, 5)
    one, other = (tnlayers.collect(net, batches).layers["0"].inputs for batches in ([x], [x[:0], x]))
    assert torch.equal(one.factor, other.factor)


def test_tokens_are_counted_in_every_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3), nn.Flatten(), nn.Linear(256, 5))
    x = torch.randn(3, 4, 8, 8)
    tokens = [
        {name: layer.tokens for name, layer in tnlayers.collect(net, [x], mode=mode).layers.items()}
        for mode in ("factor", "diagonal", "none")
    ]
    assert tokens == [{"0": 3 * 36 * 2, "1": 3 * 36, "3": 3}] * 3
    batches = texts()
    counted = [
        [layer.tokens for layer in tnlayers.collect(model(), batches, mode=m).layers.values()]
        for m in ("factor", "none")
    ]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_precision_and_autocast(dtype, gradients):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype), torch.randn(50, 6).to(dtype)
    held = tnlayers.collect(net, [x], gradients=gradients)
    assert torch.allclose(gram(held.layers["0"].inputs.factor), x.float().mT @ x.float(), rtol=1e-4, atol=1e-3)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            inside = tnlayers.collect(net, [x], gradients=gradients)
        assert torch.allclose(gram(held.layers["2"].inputs.factor), gram(inside.layers["2"].inputs.factor), rtol=0.05)


@pytest.mark.parametrize("gradients", [False, True])
def test_inference_mode_is_no_trouble(gradients):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(20, 4)
    outside = tnlayers.collect(net, [x], gradients=gradients)
    with torch.inference_mode():
        inside = tnlayers.collect(net, [x], gradients=gradients)
        made_there = x.clone()
    assert torch.equal(outside.layers["2"].inputs.factor, inside.layers["2"].inputs.factor)
    held = tnlayers.collect(net, [made_there])
    assert torch.equal(outside.layers["2"].inputs.factor, held.layers["2"].inputs.factor)


def test_recomputed_layers_count_once():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
            self.again = True

        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False) if self.again else self.a(x)
            return self.b(y)

    net, batches = Recomputed(), [torch.randn(20, 4) for _ in range(2)]
    again = tnlayers.collect(net, batches, gradients=True, outputs=True)
    net.again = False
    once = tnlayers.collect(net, batches, gradients=True, outputs=True)
    for name, layer in once.layers.items():
        assert layer.tokens == again.layers[name].tokens == 40
        for (_, one), (_, other) in zip(layer.parts(), again.layers[name].parts(), strict=True):
            assert torch.equal(one.factor, other.factor)


def test_layers_without_numbers_are_refused_and_stay_so():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"got a lazy 0\.weight; run one forward pass first"):
        tnlayers.collect(net, [torch.zeros(2, 3)])
    assert isinstance(net[0].weight, nn.parameter.UninitializedParameter)
    with pytest.raises(ValueError, match=r"got none \(0: its weight is on the meta device"):
        tnlayers.collect(nn.Sequential(nn.Linear(3, 3, device="meta")), [torch.zeros(2, 3)])
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"got none \(0: its weight is parametrized"):
        tnlayers.collect(nn.Sequential(plain), [torch.zeros(2, 3)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_encoders_does_not_hide_layers(padded):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, x = nn.TransformerEncoder(block, 2).eval(), torch.randn(4, 5, 8)
    batch = {"src": x}
    if padded:
        batch["src_key_padding_mask"] = torch.arange(5)[None, :] >= torch.tensor([5, 3, 2, 5])[:, None]
    with torch.no_grad():
        wanted = net(**batch)
    held = tnlayers.collect(net, [batch])
    assert {name: layer.tokens for name, layer in held.layers.items()} == {
        f"layers.{k}.{name}": tokens
        for k in range(2)
        for name, tokens in (("self_attn.out_proj", 0), ("linear1", 20), ("linear2", 20))
    }
    with torch.no_grad():
        assert torch.equal(net(**batch), wanted)
    with pytest.warns(CalibrationWarning, match=r"knows nothing of 2 layers .*out_proj of nn\.MultiheadAttention"):
        tnlayers.compress(net, keep=0.8, calibration=tnlayers.collect(net, [batch] * 5))
    with torch.no_grad():
        assert net(**batch).shape == wanted.shape


def test_a_one_of_several_samples_is_no_loss():
    """A batch of one sample with one output is preserved as one of many would be."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 1)), torch.randn(7, 3)
    whole = tnlayers.collect(net, [x], gradients=True).power
    parts = tnlayers.collect(net, [*x.split(1)], gradients=True).power
    assert whole == pytest.approx(parts, rel=1e-5)
    huge = tnlayers.collect(net, [x * 1e25], gradients=True).power
    assert huge == pytest.approx(float(net(x * 1e25).detach().double().square().sum()), rel=1e-5)


def test_nothing_is_drawn_from_the_global_generator():
    net, x = nn.Sequential(nn.Linear(3, 4)), [torch.randn(7, 3)]
    state = torch.get_rng_state()
    one, other = (tnlayers.collect(net, x, gradients=True) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.layers["0"].gradients.factor, other.layers["0"].gradients.factor)
    third = tnlayers.collect(net, x, gradients=True, seed=1)
    assert not torch.equal(one.layers["0"].gradients.factor, third.layers["0"].gradients.factor)


def test_layers_of_other_widths_do_not_share_one_tensor():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.last = tnlayers.contraction_layers.FlatLinear((2, 3), (4,)), nn.Linear(3, 5)

        def forward(self, x):
            return self.flat(x).sum() + self.last(x).sum()

    x = torch.randn(7, 2, 3)
    held = tnlayers.collect(Both(), [x])
    assert held.layers["flat"].inputs.features == 6
    assert held.layers["last"].inputs.features == 3
    assert (held.layers["flat"].tokens, held.layers["last"].tokens) == (7, 14)


def test_a_checkpoint_of_other_statistics_is_refused(tmp_path):
    net, batches, file = model(), texts(), tmp_path / "held.safetensors"
    tnlayers.collect(net, batches, checkpoint=file)
    for options, message in (({"gradients": True}, "without gradients"), ({"outputs": True}, "without outputs")):
        with pytest.raises(ValueError, match=f"same statistics, got one {message}"):
            tnlayers.collect(net, batches, checkpoint=file, **options)


def test_a_layer_that_one_side_alone_has_seen_can_be_merged():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x, which):
            return self.experts[which](x)

    net, x = Experts(), torch.randn(9, 3)
    whole = tnlayers.collect(net, [(x, 0), (x, 1)], gradients=True)
    first, second = (tnlayers.collect(net, [(x, k)], gradients=True) for k in (0, 1))
    first.merge(second)
    for name, layer in whole.layers.items():
        assert layer.tokens == first.layers[name].tokens == 9
        assert torch.allclose(layer.inputs.factor.abs(), first.layers[name].inputs.factor.abs(), atol=1e-5)
    other = tnlayers.collect(nn.Linear(4, 3), [x.new_ones(2, 4)])
    other.layers = {"experts.0": other.layers[""], "experts.1": other.layers[""]}
    with pytest.raises(ValueError, match="same statistics"):
        first.merge(other)
