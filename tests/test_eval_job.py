"""`tnlayers eval` and `tnlayers export` on tiny models of transformers."""

import importlib.util
import json
import math
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_jobs import WORDS, call, done, one_line, sentences, text_model, texts_file, words_tokenizer  # noqa: E402
from tiny_transformers import POSITIONS, SIZES, relative  # noqa: E402

import tnlayers  # noqa: E402
from tnlayers.compression.job import CompressConfig, run  # noqa: E402
from tnlayers.convert import parameter_count  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::decompositions.weighted.CalibrationWarning")

IDS = torch.arange(18).reshape(2, 9) % 57 + 3


def classifier(where):
    config = transformers.BertConfig(**SIZES, **POSITIONS, vocab_size=60, id2label={0: "short", 1: "long"},
                                     label2id={"short": 0, "long": 1})  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(where)
    words_tokenizer().save_pretrained(where)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    texts = texts_file(where / "texts.jsonl")
    text_model(where / "bert", "bert", "mean_tokens")
    text_model(where / "gpt2", "gpt2")
    classifier(where / "classes")
    (where / "document.txt").write_text("\n\n".join(sentences(30, seed=2)))
    rows = [f"{text}\t{'long' if len(text) > 30 else 'short'}" for text in sentences(40, seed=3)]
    (where / "labelled.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnlayers.report.Report.html", lambda self, path: "")
        for name in ("bert", "gpt2"):
            run(CompressConfig(str(where / name), where / f"small-{name}", keep=0.5, calib=texts, count=48,
                               batch_size=8, metrics=("size",)))  # fmt: skip
    return where


def measured(*arguments):
    return [
        {metric["name"]: metric for metric in one["metrics"]} | {"conditions": one["conditions"]}
        for one in json.loads(done("eval", *arguments, "--json").stdout)
    ]


# --- eval ---


def test_size_needs_no_data_and_counts_as_the_formats_do(place):
    (found,) = measured(place / "small-bert", "--metrics", "size")
    model = tnlayers.load(place / "small-bert")
    assert found["parameters"]["value"] == parameter_count(model)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["MiB of weights"]["value"] == pytest.approx(stored / 2**20)
    assert found["parameters"]["value"] * 4 < stored
    assert found["conditions"]["size"] == {"parameters": "as the formats count them", "MiB": "of all numbers stored"}


def test_perplexity_of_a_document_by_hand(place):
    arguments = [place / "gpt2", "--document", place / "document.txt", "--window", "8", "--stride", "4"]
    (found,) = measured(*arguments)
    model = transformers.GPT2LMHeadModel.from_pretrained(place / "gpt2").double()
    ids = words_tokenizer(causal=True)((place / "document.txt").read_text())["input_ids"]
    total, count, done_to = 0.0, 0, 1
    for begin in range(0, len(ids), 4):
        piece = torch.tensor([ids[begin : begin + 8]])
        with torch.no_grad():
            logs = model(piece).logits[0].log_softmax(-1)
        for k in range(max(1, done_to - begin), piece.shape[1]):
            total, count = total - float(logs[k - 1, piece[0, k]]), count + 1
        done_to = begin + piece.shape[1]
        if done_to == len(ids):
            break
    assert found["perplexity"]["count"] == count == len(ids) - 1
    assert found["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["conditions"]["perplexity"]["window"] == 8
    assert found["conditions"]["perplexity"]["stride"] == 4


def test_two_models_in_one_table(place):
    arguments = ["--against", place / "gpt2", "--texts", place / "texts.jsonl", "--metrics", "size,perplexity"]
    result = done("eval", place / "small-gpt2", *arguments)
    head, _, *rows = result.stdout.splitlines()
    assert head.split() == ["metric", "before", "after", "change"]
    assert [row.split()[0] for row in rows[:3]] == ["parameters", "MiB", "perplexity"]
    before, after = measured(place / "small-gpt2", *arguments)
    assert after["parameters"]["value"] < before["parameters"]["value"]
    assert after["conditions"] == before["conditions"]
    assert f"{int(before['parameters']['value']):,}" in rows[0]


def test_similarity_to_a_reference(place):
    data = ["--texts", place / "texts.jsonl", "--n", "40"]
    same, other = (measured(place / name, "--reference", place / "bert", *data)[0] for name in ("bert", "small-bert"))
    assert same["cosine, worst"]["value"] == pytest.approx(1, abs=1e-6)
    assert other["cosine, mean"]["value"] < same["cosine, mean"]["value"]
    assert other["cosine, mean"]["count"] == 40
    assert other["conditions"]["similarity"]["pooling"] == "mean"


def test_accuracy_and_probe_of_labelled_texts(place):
    (found,) = measured(place / "classes", "--labelled", place / "labelled.tsv", "--label", "label")
    model = transformers.BertForSequenceClassification.from_pretrained(place / "classes").eval()
    tokenizer = words_tokenizer()
    right = 0
    for row in (place / "labelled.tsv").read_text().splitlines()[1:]:
        text, label = row.split("\t")
        with torch.no_grad():
            made = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits
        right += model.config.id2label[int(made.argmax())] == label
    assert found["accuracy"]["value"] == pytest.approx(right / 40)
    assert found["accuracy"]["low"] < right / 40 < found["accuracy"]["high"]


def test_probe(place):
    pytest.importorskip("sklearn")
    (found,) = measured(place / "bert", "--labelled", place / "labelled.tsv", "--metrics", "probe")
    assert 0 <= found["probe accuracy"]["value"] <= 1
    assert found["conditions"]["probe"]["measured on"] == 20


def test_speed_and_memory(place, monkeypatch):
    monkeypatch.setattr("tnlayers.evaluation.evaluate.throughput", quick_throughput())
    for name in ("bert", "gpt2"):  # a decoder's tokenizer has nothing to pad with
        data = ["--texts", place / "texts.jsonl", "--n", "8", "--batch-size", "4"]
        (found,) = measured(place / name, *data, "--metrics", "speed,memory")
        assert found["tokens/s"]["value"] > 0
        assert found["peak MiB of a call"]["value"] >= 0
        assert found["conditions"]["speed"]["batch"] == 4


def quick_throughput():
    from tnlayers.evaluation.resources import throughput

    return lambda model, batch, **options: throughput(model, batch, seconds=0, threads=options["threads"])


def test_evaluations_that_are_refused(place, tmp_path):
    data = ["--texts", place / "texts.jsonl"]
    one_line(call("eval", place / "bert", *data, "--metrics", "bleu"), 2, "got 'bleu'")
    one_line(call("eval", place / "bert", *data, "--metrics", "accuracy"), 2, "accuracy needs labelled")
    one_line(call("eval", place / "bert", *data, "--metrics", "similarity"), 2, "similarity needs reference")
    one_line(call("eval", tmp_path, *data), 2, "expected a config.json")
    one_line(call("eval", place / "bert", *data, "--column", "review"), 2, "line 1", "review")
    long = ["--document", place / "document.txt", "--window", "99"]
    one_line(call("eval", place / "gpt2", *long), 2, "16", "99")
    one_line(call("eval", place / "gpt2", "--document", place / "document.txt", "--bos", "yes", "--stride", "99"), 2)
    bare = tmp_path / "bare"
    transformers.BertModel.from_pretrained(place / "bert").save_pretrained(bare)
    one_line(call("eval", bare, *data), 2, "texts need a tokenizer, got none beside", str(bare))
    words_tokenizer(words=[*(f"x{k}" for k in range(90)), *WORDS]).save_pretrained(bare)
    one_line(call("eval", bare, *data, "--reference", place / "bert"), 2, "vocabulary of BertModel")


def test_a_sample_is_the_same_in_every_run(place):
    random.seed(1)
    data = ["--texts", place / "texts.jsonl", "--n", "12", "--metrics", "perplexity"]
    first, again, other = (measured(place / "gpt2", *data, "--seed", s)[0]["perplexity"] for s in ("1", "1", "2"))
    assert first == again != other


# --- export ---


@pytest.mark.parametrize(("name", "kind"), [("bert", "AutoModel"), ("gpt2", "AutoModelForCausalLM")])
def test_a_dense_folder_is_ordinary(place, tmp_path, name, kind):
    out = tmp_path / "dense"
    assert done("export", place / f"small-{name}", out, "--dense").stdout == f"{out} written\n"
    dense = getattr(transformers, kind).from_pretrained(out)
    small = tnlayers.load(place / f"small-{name}")
    assert not any("cores" in key for key in dense.state_dict())
    with torch.no_grad():
        assert relative(dense(input_ids=IDS)[0], small(input_ids=IDS)[0]) < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"]
    one_line(call("export", place / f"small-{name}", out, "--dense"), 2, "must be empty or new")
    done("export", place / f"small-{name}", out, "--dense", "--overwrite")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_pairs_of_plain_layers_need_no_tnlayers(place, tmp_path, name):
    out = tmp_path / "plain"
    assert f"{out} written" in done("export", place / f"small-{name}", out, "--two-linear").stdout
    spec = importlib.util.spec_from_file_location("load_two_linear", out / "load_two_linear.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    plain, small = loader.load(out), tnlayers.load(place / f"small-{name}")
    assert not [m for m in plain.modules() if type(m).__module__.startswith("tnlayers")]
    with torch.no_grad():
        assert relative(plain(input_ids=IDS)[0], small(input_ids=IDS)[0]) < 1e-5
    dense = transformers.AutoModel.from_pretrained(place / name)
    assert sum(p.numel() for p in plain.parameters()) < 0.8 * sum(p.numel() for p in dense.parameters())


def test_exports_that_are_refused_and_interrupted(place, tmp_path, monkeypatch):
    one_line(call("export", tmp_path / "nothing", tmp_path / "out", "--dense"), 2, "nothing")
    one_line(call("export", place / "small-bert", tmp_path / "no" / "out", "--dense"), 2, "the parent")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tnlayers.pretrained.exported.write_beside", interrupted)
    result = call("export", place / "small-bert", tmp_path / "out", "--dense")
    assert result.exit_code == 130
    assert result.stderr == "tnlayers: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
