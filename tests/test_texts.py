"""Reading texts, sampling, batches, windows: against slow truths, and every refusal by its message."""

import csv
import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Words
from torch import nn

from tnlayers.texts import (
    Texts,
    batches,
    check_tokens,
    max_positions,
    read_document,
    read_texts,
    sample,
    token_windows,
    vocabulary_size,
)

PACK = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress}


def write(folder, name, text, pack=""):
    path = folder / (name + pack)
    path.write_bytes(PACK[pack](text if isinstance(text, bytes) else text.encode()))
    return path


# --- files ---


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("a.txt", "one two\r\n\n  \nthree \u2028 four\n", None),
        (
            "a.jsonl",
            '{"text": "one two", "label": 1}\n\n{"text": " "}\n{"text": "three \\u2028 four", "label": 0}\n',
            None,
        ),
        ("a.tsv", "label\tsentence\n1\tone two\n\n2\t \n0\tthree \u2028 four\n", (1, 0)),
        ("a.csv", 'label,text\n1,one two\n\n1," "\n0,three \u2028 four\n', (1, 0)),
    ],
)
def test_every_kind_of_file(tmp_path, name, text, labels, pack):
    texts = read_texts(write(tmp_path, name, text, pack), labelled=labels is not None)
    assert list(texts) == ["one two", "three \u2028 four"]
    assert texts.dropped == 2
    assert texts.labels == labels
    assert texts.source == name + pack
    assert "2 texts" in str(texts)
    assert "2 blank ones dropped" in str(texts)


def test_labels_of_jsonl(tmp_path):
    rows = [{"body": "a", "y": "pos"}, {"body": "", "y": "?"}, {"body": "b", "y": "neg"}]
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))
    texts = read_texts(path, column="body", labelled="y")
    assert (list(texts), texts.labels, texts.classes) == (["a", "b"], (1, 0), ("neg", "pos"))
    assert read_texts(path, column="body", labelled="y", classes=("pos", "neg")).labels == (0, 1)
    truth = write(tmp_path, "y.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": 3}')
    assert read_texts(truth, labelled=True).labels == (1, 3)


def test_quotes_are_characters_in_tsv_and_quotes_in_csv(tmp_path):
    rows = ['1\t12\t" The pie', '0\t13\tsaid "100 percent"']
    texts = read_texts(write(tmp_path, "a.tsv", "\ufeffQuality\t#1 ID\t#1 String\n" + "\n".join(rows)),
                       column="#1 String", labelled="Quality")  # fmt: skip
    assert list(texts) == ['" The pie', 'said "100 percent"']
    assert texts.labels == (1, 0)
    path = tmp_path / "a.csv"
    wanted = ['a "quoted" word', "two\nlines, and a comma", "x" * 200_000]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(wanted)])
    limit = csv.field_size_limit()
    assert list(read_texts(path)) == wanted
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "options", "wanted", "labels"),
    [
        ("text\tlabel\na\t1\n", {"labelled": True}, ["a"], (1,)),
        ("label\tsentence\n1\ta\n", {}, ["a"], None),
        ("a\tx\nb\ty\n", {"column": 0, "labelled": True}, ["a", "b"], (0, 1)),
        ("a\tx\nb\ty\n", {"column": 1}, ["x", "y"], None),
        ("a\tx\nb\ty\n", {"column": 1, "header": True}, ["y"], None),
        ("a\tx\nb\ty\n", {"labelled": 1}, ["a", "b"], (0, 1)),
        ("text\tx\nb\ty\n", {"column": 1, "header": False}, ["x", "y"], None),
        ("only\nrows\n", {}, ["only", "rows"], None),
        ("Text \tn\na\t1\n", {}, ["a"], None),
        ("q\tw\na\t1\n", {"column": "q", "labelled": "w"}, ["a"], (1,)),
    ],
)
def test_columns_and_headers(tmp_path, text, options, wanted, labels):
    texts = read_texts(write(tmp_path, "a.tsv", text), **options)
    assert (list(texts), texts.labels) == (wanted, labels)


@pytest.mark.parametrize(
    ("name", "text", "options", "match"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, r"line 2: expected a JSON object, got '\{\"text\": '"),
        ("a.jsonl", '{"text": "a"}\n\n["a"]', {}, "line 3: expected a JSON object, got list"),
        ("a.jsonl", '{"body": "a"}', {}, r"line 1: expected the field text or sentence, got \['body'\]"),
        ("a.jsonl", '{"text": "a"}', {"labelled": True}, "line 1: expected the field label or labels"),
        ("a.jsonl", '{"text": 3}', {}, "line 1: the text must be a string, got int"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', {"labelled": True}, "line 1: the label .*integer, got 0.5"),
        ("a.jsonl", "[" * 100_000, {}, "line 1: expected a JSON object"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", {}, "line 3: expected 2 columns as in the first row, got 1"),
        ("a.tsv", "text\tlabel\na\t-1\n", {"labelled": True}, "line 2: the label must be >= 0, got -1"),
        ("a.tsv", "text\tlabel\na\tx\nb\t \n", {"labelled": True}, "line 3: the label must be a word"),
        ("a.tsv", "text\tlabel\na\tx\n", {"labelled": True, "classes": ("p", "q")}, r"line 2: .*\['p', 'q'\], got 'x'"),
        ("a.tsv", "a\tb\tc\n", {}, r"3 columns \(no header\); say which one with column="),
        ("a.tsv", "a\tb\n", {"labelled": True}, "no header; say where the text is"),
        ("a.tsv", "a\tb\n", {"column": 2}, "column number from 0 to 1, got 2"),
        ("a.tsv", "a\tb\n", {"column": "c"}, r"column of \['a', 'b'\], got 'c'"),
        ("a.tsv", "a\tb\n", {"column": "a", "header": False}, "a file without header"),
        ("a.tsv", "a\tb\n", {"column": 1, "labelled": 1}, "must be two columns, got column 1 for both"),
        ("a.csv", 'text\n"two\nlines"\nx\n"open\n\n', {}, "line 5: expected comma-separated values"),
        ("a.csv", 'text,label\n"two\nlines",1\nx\n', {}, "line 4: expected 2 columns"),
        ("a.txt", b"fine\nalso\nb\xffd\n", {}, "line 3: expected UTF-8, got byte 0xff"),
        ("a.txt", "\n \n", {}, r"holds no text \(2 blank lines\)"),
        ("a.tsv", "text\tlabel\n", {}, "holds no text"),
        ("a.txt", "a", {"labelled": True}, ".txt file has no labels"),
        ("a.pdf", "a", {}, r"expected one of .txt, .jsonl, .tsv, .csv \(also .gz, .xz\)"),
    ],
)
def test_refusals_name_the_line(tmp_path, name, text, options, match):
    with pytest.raises(ValueError, match=match):
        read_texts(write(tmp_path, name, text), **options)


@pytest.mark.parametrize("pack", [".gz", ".xz"])
def test_damaged_files_and_missing_ones(tmp_path, pack):
    whole = PACK[pack](bytes(random.Random(0).choices(b"abc\n", k=50_000)))
    (tmp_path / f"a.txt{pack}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged after line"):
        read_texts(tmp_path / f"a.txt{pack}")
    (tmp_path / f"b.txt{pack}").write_bytes(b"plain text\n")
    with pytest.raises(ValueError, match="is damaged after line 0"):
        read_texts(tmp_path / f"b.txt{pack}")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="got the folder"):
        read_texts(tmp_path / "folder.txt")


def test_document_keeps_everything(tmp_path):
    text = "ROMEO:\n\n  But\r\nsoft\n"
    assert read_document(write(tmp_path, "a.txt", text, ".xz")) == text
    with pytest.raises(ValueError, match=r"use read_texts for \.tsv"):
        read_document(write(tmp_path, "a.tsv", text))


@pytest.mark.data
def test_glue_files():
    folder = Path(__file__).resolve().parents[1] / "../shared/data/glue-small"
    if not folder.is_dir():
        pytest.skip("no shared data")
    assert len(read_texts(folder / "SST-2" / "dev.tsv.gz", labelled=True)) == 872
    texts = read_texts(folder / "MRPC" / "dev.tsv.gz", column="#1 String", labelled="Quality")
    assert set(texts.labels) == {0, 1}
    assert texts[0].startswith("He said the foodservice pie business")


# --- Texts and samples ---


def test_texts_slice_with_their_labels():
    texts = Texts(("a", "b", "c"), (0, 1, 2), ("x", "y", "z"))
    assert list(texts[1:]) == ["b", "c"]
    assert texts[::-1].labels == (2, 1, 0)
    assert texts[-1] == "c"
    with pytest.raises(ValueError, match="expected 3 labels"):
        Texts(("a", "b", "c"), (0, 1))


@given(st.integers(0, 60), st.integers(0, 2**31), st.data())
def test_sample_is_without_replacement_and_a_prefix(size, seed, data):
    n = data.draw(st.integers(0, size))
    drawn = sample(range(size), n, seed)
    assert len(set(drawn)) == n
    assert set(drawn) <= set(range(size))
    assert sample(range(size), size, seed)[:n] == drawn
    assert sorted(sample(range(size), size, seed)) == list(range(size))


def test_sample_is_fixed_fair_and_keeps_labels():
    assert sample(range(100), 6, 0) == [84, 76, 43, 28, 53, 2]  # the same on every machine, for ever
    counts = torch.zeros(6, 6)
    for seed in range(3000):
        for place, k in enumerate(sample(range(6), 3, seed)):
            counts[place, k] += 1
    assert float((counts[:3] - 500).abs().max()) < 5 * (3000 * 5 / 36) ** 0.5
    texts = Texts(tuple("abcdef"), tuple(range(6)))
    some = sample(texts, 4, 3)
    assert [texts.texts.index(t) for t in some] == list(some.labels)
    with pytest.raises(ValueError, match=r"0 <= n <= 6 .*, got 7"):
        sample(texts, 7)


# --- batches ---

TEXTS = Texts(("one two three four", "five", "six one", "two two two", "nine ten one"), (0, 1, 0, 1, 1))


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_hold_every_text_once(size, side, sort):
    tokenizer = Words(side=side, pad=9)
    made = batches(TEXTS, tokenizer, batch_size=size, sort=sort)
    assert sorted(made.order) == list(range(5))
    assert len(made) == -(-5 // size)
    seen, lengths = [], []
    for batch in made:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            assert mask == sorted(mask, reverse=side == "right")
            assert {i for i, m in zip(ids, mask, strict=True) if not m} <= {9}
            seen.append([i for i, m in zip(ids, mask, strict=True) if m])
            lengths.append(len(seen[-1]))
        assert any(all(mask) for mask in batch["attention_mask"].tolist())
    assert seen == [tokenizer(TEXTS[k])["input_ids"] for k in made.order]
    assert made.tokens == sum(lengths)
    assert made.order == (tuple(sorted(range(5), key=[6, 3, 4, 5, 5].__getitem__)) if sort else (0, 1, 2, 3, 4))
    rows = torch.tensor(made.order)
    assert made.restore(rows).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([labels for _, labels in made.labelled()]).tolist() == [TEXTS.labels[k] for k in made.order]


def test_batches_are_cut_and_count_it():
    made = batches(TEXTS, Words(maximum=5))
    assert (made.max_length, made.cut, made[0]["input_ids"].shape[1]) == (5, 3, 5)
    assert batches(TEXTS, Words(maximum=5), max_length=6).cut == 1
    assert batches(TEXTS, Words()).max_length is None


def test_batches_refuse():
    with pytest.raises(TypeError, match="got one string"):
        batches("text", Words())
    with pytest.raises(ValueError, match="at least one text"):
        batches([], Words())
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        batches(["a"], Words(), batch_size=0)
    with pytest.raises(ValueError, match="max_length >= 1, got 0"):
        batches(["a"], Words(), max_length=0)
    with pytest.raises(ValueError, match=r"no padding token; set tokenizer.pad_token = tokenizer.eos_token"):
        batches(["a", "b"], Words(pad=None))
    assert len(batches(["a", "b c"], Words(pad=None), batch_size=1)) == 2
    with pytest.raises(ValueError, match="no token of text 1, ' '"):
        batches(["a", " "], Words(special=False))
    with pytest.raises(TypeError, match="can be called with texts, got dict"):
        batches(["a"], {}, batch_size=1)
    with pytest.raises(TypeError, match="to return input_ids, got list"):
        batches(["a"], lambda texts, truncation, max_length: [1], batch_size=1)
    made = batches(["a", "b"], Words())
    with pytest.raises(ValueError, match=r"2 rows .*, got 3"):
        made.restore(torch.ones(3))
    with pytest.raises(ValueError, match="have no labels"):
        list(made.labelled())


# --- windows ---


@given(st.integers(2, 9), st.integers(0, 40), st.data())
def test_windows_score_every_token_with_context_once(window, tokens, data):
    bos = data.draw(st.sampled_from([False, True, "start"]))
    stride = data.draw(st.one_of(st.none(), st.integers(1, window - (bos is True))))
    ids = list(range(100, 100 + tokens))
    stream = [7, *ids] if bos == "start" else ids
    if len(stream) < (1 if bos is True else 2):
        with pytest.raises(ValueError, match="tokens to score one"):
            token_windows(ids, window=window, stride=stride, bos=bos, bos_id=7)
        return
    windows = token_windows(ids, window=window, stride=stride, bos=bos, bos_id=7)
    scored, place = [], []
    for row, n in windows:
        assert 1 <= n < len(row) <= window
        assert (row[0] == 7) == (bos is True or (bos == "start" and not place))
        scored += row[-n:].tolist()
        content = row.tolist()[1:] if bos is True else row.tolist()
        start = stream.index(content[0])
        assert content == stream[start : start + len(content)]
        place.append(start)
    step = windows.stride
    assert place == [k * step for k in range(len(place))]
    room = window - (bos is True)
    if bos is True:
        wanted = stream
    elif step < room:  # overlapping: only the very first token has no context
        wanted = stream[1:]
    else:
        wanted = [t for k, t in enumerate(stream) if k % room]
    assert scored == wanted
    assert windows.scored == len(wanted)


def test_windows_join_texts_and_say_what_they_did():
    class Marked(Words):
        def encode(self, text, special, longest):
            return super().encode(text.replace("\n\n", " | "), special, longest)

    windows = token_windows(["a b", "c"], Marked(), window=3)
    assert windows.ids.tolist() == [1, 3, 4, 5, 6]  # a BOS, as the tokenizer itself puts one
    assert windows.conditions == "window 3, stride 3, one BOS at the start"
    plain = token_windows(["a b", "c"], Marked(special=False), window=3, stride=2)
    assert plain.ids.tolist() == [3, 4, 5, 6]
    assert plain.conditions == "window 3, stride 2, no BOS"
    assert token_windows(["a b", "c"], Words(), window=3, bos=False).ids.tolist() == [3, 4, 5]
    each = token_windows("a b c", Words(), window=3, bos=True)
    assert [(row.tolist(), n) for row, n in each[:]] == [([1, 3, 4], 2), ([1, 5], 1)]
    assert each.conditions == "window 3, stride 2, a BOS before every window"
    assert token_windows(torch.arange(5)[None], window=3).ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("texts", "options", "error", "match"),
    [
        ([1, 2, 3], {"window": 1}, ValueError, "window >= 2"),
        ([1, 2, 3], {"window": 3, "stride": 4}, ValueError, "1 <= stride <= 3 .*got 4; a larger one would skip"),
        ([1, 2, 3], {"window": 3, "stride": 0}, ValueError, "1 <= stride <= 3"),
        ([1, 2, 3], {"window": 3, "stride": 3, "bos": True, "bos_id": 0}, ValueError, "stride <= 2 .*less its BOS"),
        ([1, 2, 3], {"window": 3, "bos": True}, ValueError, "needs a BOS token.*give bos_id="),
        ([1, 2, 3], {"window": 3, "bos": "yes"}, ValueError, "must be True, False, 'auto' or 'start', got 'yes'"),
        ([1], {"window": 3}, ValueError, "at least 2 tokens to score one, got 1"),
        ([], {"window": 3}, ValueError, "at least 2 tokens"),
        ("a b", {"window": 3}, TypeError, "texts need a tokenizer"),
        (" ", {"window": 3, "tokenizer": Words()}, ValueError, "makes no token"),
        ([0.5, 1], {"window": 3}, TypeError, "must be integers, got torch.float32"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            {"window": 3},
            ValueError,
            r"expected ids \(tokens,\) int64, got \(2, 3\)",
        ),
    ],
)
def test_windows_refuse(texts, options, error, match, unchecked):
    with pytest.raises(error, match=match):
        token_windows(texts, **options)


# --- what a model can take ---


class Config:
    vocab_size = 20
    n_positions = 4


class Model(nn.Module):
    def __init__(self, table=None, config=None):
        super().__init__()
        self.table, self.config = table, config

    def get_input_embeddings(self):
        if self.table is None:
            raise NotImplementedError
        return self.table


def test_sizes_of_a_model():
    assert vocabulary_size(Model(nn.Embedding(12, 2), Config())) == 12
    assert vocabulary_size(Model(None, Config())) == 20
    assert max_positions(Model(None, Config())) == 4
    nested = type("Outer", (), {"text_config": Config()})()
    assert max_positions(Model(None, nested)) == 4
    assert vocabulary_size(Model()) is None
    assert max_positions(nn.Linear(1, 1)) is None


def test_check_tokens():
    model = Model(nn.Embedding(12, 2), Config())
    check_tokens(model, torch.arange(12))
    check_tokens(model, {"pixels": torch.ones(2)})
    with pytest.raises(ValueError, match=r"embed: expected token ids from 0 to 11 \(vocabulary of Model\), got 12"):
        check_tokens(model, torch.tensor([12]), caller="embed")
    with pytest.raises(ValueError, match="got -1; is this the model's own tokenizer"):
        check_tokens(Model(), torch.tensor([-1]))
    check_tokens(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"at most 4 tokens .*got 5; make the batches with max_length=4"):
        check_tokens(model, {"input_ids": torch.ones(1, 5, dtype=torch.int64)})


# --- the real thing ---


def hugging_face_tokenizer(**options):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "one", "two", "three", "four", "five", "six"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[CLS]", unk_token="[UNK]", **options
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [None, 4])
def test_batches_are_what_hugging_face_pads(side, max_length):
    tokenizer = hugging_face_tokenizer(padding_side=side)
    wanted = tokenizer(
        list(TEXTS), padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt"
    )
    (made,) = batches(TEXTS, tokenizer, max_length=max_length)
    assert set(made) == set(wanted)
    assert all(torch.equal(made[name], wanted[name]) for name in made)


def test_windows_of_a_hugging_face_tokenizer(caplog):
    tokenizer = hugging_face_tokenizer(model_max_length=3)
    assert len(token_windows("one two " * 20, tokenizer, window=4).ids) == 41
    assert not caplog.records  # no warning of a text that is too long
    assert token_windows("one two", tokenizer, window=4).ids.tolist() == [1, 4, 5]
    assert token_windows("one two", tokenizer, window=4, bos=False).ids.tolist() == [4, 5]
