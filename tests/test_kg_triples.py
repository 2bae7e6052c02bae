"""Triples: every way to read them, what is refused and how, vocabularies, statistics, PyKEEN's own datasets."""

import bz2
import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from tnlayers.kg import Triples, load_triples
from tnlayers.kg.describe import cardinalities, first_of_each, repeated

DATA = Path(__file__).resolve().parents[1] / "../shared/data"
ROWS = [("bob", "knows", "ann"), ("ann", "likes", "cid"), ("cid", "knows", "bob")]
TEST = [("ann", "knows", "dan")]


def write(folder, name, text):
    data = text.encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(Path(name).suffix)
    (folder / name).write_bytes(pack(data) if pack else data)
    return folder / name


def joined(rows, mark, order=(0, 1, 2), end="\n"):
    return "".join(mark.join(row[k] for k in order) + end for row in rows)


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(
    ("name", "mark", "end"),
    [(".tsv", "\t", "\n"), (".txt", "\t", "\r\n"), (".txt", " ", "\n"), (".csv", ",", "\r\n"), (".TXT", "\t", "\n")],
)
def test_every_kind_of_file_gives_the_same_triples(tmp_path, name, mark, end, pack):
    write(tmp_path, "train" + name + pack, joined(ROWS, mark, end=end))
    write(tmp_path, "test" + name + pack, joined(TEST, mark, end=end) + end)  # a blank line at the end
    triples = load_triples(tmp_path)
    assert triples.entity_to_id == {"ann": 0, "bob": 1, "cid": 2, "dan": 3}
    assert triples.relation_to_id == {"knows": 0, "likes": 1}
    assert triples.train.tolist() == [[1, 0, 0], [0, 1, 2], [2, 0, 1]]
    assert triples.test.tolist() == [[0, 0, 3]]
    assert triples.valid.shape == (0, 3)
    assert triples.train.dtype == torch.int64


@pytest.mark.parametrize("columns", ["hrt", "htr", "rht", "rth", "thr", "trh"])
def test_columns_in_any_order(tmp_path, columns):
    write(tmp_path, "train.tsv", joined(ROWS, "\t", ["hrt".index(letter) for letter in columns]))
    assert load_triples(tmp_path, columns=columns).train.tolist() == [[1, 0, 0], [0, 1, 2], [2, 0, 1]]


def test_columns_that_are_left_out_and_asked_for_by_name(tmp_path):
    write(
        tmp_path,
        "train.tsv",
        "when\twho\twhat\twhom\n" + "".join(f"19{k}\t{h}\t{r}\t{t}\n" for k, (h, r, t) in enumerate(ROWS)),
    )
    expected = load_triples({"train": ROWS}).train.tolist()
    assert load_triples(tmp_path, columns=("who", "what", "whom")).train.tolist() == expected
    assert load_triples(tmp_path, columns="-hrt", header=True).train.tolist() == expected
    with pytest.raises(ValueError, match=r"train\.tsv has no column 'where', got 'when', 'who', 'what', 'whom'"):
        load_triples(tmp_path, columns=("where", "what", "whom"))
    write(tmp_path, "train.tsv", "h\th\tr\tt\na\tb\tr\tc\n")
    with pytest.raises(ValueError, match=r"train\.tsv has more than one column 'h', got 'h', 'h', 'r', 't'"):
        load_triples(tmp_path, columns=("h", "r", "t"))
    write(tmp_path, "train.tsv", "").unlink()
    write(tmp_path, "train.csv", "a::r::b\n")
    with pytest.raises(ValueError, match=r"train\.csv: the delimiter of csv is one character and no quote, got '::'"):
        load_triples(tmp_path, delimiter="::")


def test_a_usual_header_names_the_columns(tmp_path):
    write(tmp_path, "train.csv", "Object,Subject,Predicate\n" + joined(ROWS, ",", (2, 0, 1)))
    assert load_triples(tmp_path).train.tolist() == [[1, 0, 0], [0, 1, 2], [2, 0, 1]]
    assert load_triples(tmp_path, header=False).num_entities == 7  # the header is a triple


def test_csv_quotes_and_tsv_does_not(tmp_path):
    write(tmp_path, "train.csv", '"Paris, Texas",in,"a ""state"""\n"two\nlines",in,x\n')
    assert set(load_triples(tmp_path).entity_to_id) == {"Paris, Texas", 'a "state"', "two\nlines", "x"}
    other = tmp_path / "other"
    other.mkdir()
    write(other, "train.tsv", '"a\tin\tb c\n')
    assert set(load_triples(other).entity_to_id) == {'"a', "b c"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.tsv", "a \tr\t b\n a\tr\u00a0\tc d\n"),
        ("train.csv", '  a , r,b \n"a",r, "c d"\n   \n'),
        ("train.txt", "head | relation | tail\na | r | b\na|r |c d"),
    ],
)
def test_blanks_around_labels_are_no_part_of_them(tmp_path, name, text):
    write(tmp_path, name, text)
    triples = load_triples(tmp_path, delimiter="|" if name == "train.txt" else None)
    assert triples.entity_to_id == {"a": 0, "b": 1, "c d": 2}
    assert triples.relation_to_id == {"r": 0}
    assert triples.train.tolist() == [[0, 0, 1], [0, 0, 2]]
    table = load_triples({"train": [("a ", "r", "b"), (" a", "r\n", "c d")]})
    assert (table.entity_to_id, table.train.tolist()) == (triples.entity_to_id, triples.train.tolist())


def test_csv_with_blanks_before_quotes_and_a_label_of_blanks(tmp_path):
    write(tmp_path, "train.csv", 'a, r, "b, c"\n')
    assert set(load_triples(tmp_path).entity_to_id) == {"a", "b, c"}
    write(tmp_path, "train.csv", "a,r,b\na,  ,b\n")
    with pytest.raises(ValueError, match=r"train\.csv line 2: the relation is empty"):
        load_triples(tmp_path)


def test_n_triples(tmp_path):
    text = (
        "# a comment\n"
        "<http://x/a> <http://x/r> <http://x/b> .\n\n"
        "_:n1\t<http://x/r>\t_:n2. # blank nodes\n"
        r"<http://x/\u00e9> <http://x/r> <http://x/a>." + "\n"
        r'<http://x/a> <http://x/name> "A \"quoted\" . name"@en .' + "\n"
        '<http://x/a> <http://x/age> "7"^^<http://x/int> .\n'
    )
    file = write(tmp_path, "graph.nt.gz", text)
    triples = load_triples(file)
    assert set(triples.entity_to_id) == {"http://x/a", "http://x/b", "_:n1", "_:n2", "http://x/é"}
    assert (len(triples.train), triples.literals, triples.name) == (3, 2, "graph")
    assert "statements with a literal left out: 2" in str(triples.describe())
    kept = load_triples(file, literals="keep")
    assert len(kept.train) == 5
    assert '"7"^^<http://x/int>' in kept.entity_to_id


def test_two_spellings_of_a_literal_are_one_entity(tmp_path):
    text = "".join(f"<x:a> <x:r> {term} .\n" for term in (r'"\u00e9\n"', r'"é\n"', r'"\\u00e9"', r'"\u0022"', '"é"@fr'))
    kept = load_triples(write(tmp_path, "train.nt", text), literals="keep")
    assert set(kept.entity_to_id) == {"x:a", r'"é\n"', r'"\\u00e9"', r'"\u0022"', '"é"@fr'}
    assert kept.duplicates["train"] == 1
    with pytest.raises(ValueError, match=r"training split is empty \(5 statements with a literal were left out\)"):
        load_triples(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.tsv", "a\tr\tb\n\na\tr\n", r"train.tsv line 3: expected 3 columns divided by a tab, got 2 \('a | r'\)"),
        ("train.tsv", "a\tr\tb\tc\n", "train.tsv line 1: expected 3 columns divided by a tab, got 4"),
        ("train.txt", "a r b\na r b c\n", "train.txt line 2: expected 3 columns divided by ' ', got 4"),
        ("train.tsv", "a\tr\tb\na\t\tb\n", "train.tsv line 2: the relation is empty"),
        ("train.csv", "head,relation,tail\na,r,b\n,r,b\n", "train.csv line 3: the head is empty"),
        ("train.csv", 'a,r,b\n"x\ny",r,b\na,r\n', "train.csv line 4: expected 3 columns divided by ',', got 2"),
        ("train.csv", 'a,r,"b\n', "train.csv line 1 is malformed"),
        ("train.nt", "<a> <r> <b> .\n<a> <r> <b>\n", "train.nt line 2: expected '<subject> <predicate> <object> .'"),
        ("train.nt", "<a> <r> .\n", "train.nt line 1"),
        ("train.nt", "<a> <r> <b> .\n<a> <r> <b> <graph> .\n", "train.nt line 2: expected '<subject> <predicate>"),
        ("train.nt", "<a> <r> <b> .\n<a\\U00110000> <r> <b> .\n", r"train.nt line 2: \\U00110000 stands for no char"),
        ("train.nt", "<a> <r> <\\ud800> .\n", r"train.nt line 1: \\ud800 stands for no character"),
        ("train.nt", "<a> <r> <\\u12> .\n", "train.nt line 1: expected '<subject>"),
        ("train.tsv", "a\nb\n", r"train.tsv line 1: expected 3 .*, got 1 \('a'\); delimiter= says what divides"),
        ("train.tsv", "a\tr\tb\na\tr\tb\tc\n", "train.tsv line 2: .* columns='hrt-' leaves a fourth one out"),
        ("train.tsv", "a\tr\tb\nc\tr\t\0\n", "train.tsv line 2 holds a zero byte; expected text in UTF-8"),
        ("train.csv", "a,r,b\n,,\n", "train.csv line 2: the head is empty"),
        ("train.tsv", "", "the training split is empty"),
        ("train.tsv", "\n \n", "the training split is empty"),
    ],
)
@pytest.mark.parametrize("pack", ["", ".gz"])
def test_malformed_files_are_refused_by_line(tmp_path, name, text, message, pack):
    write(tmp_path, name + pack, text)
    with pytest.raises(ValueError, match=message.replace(name, name + pack)):
        load_triples(tmp_path)


def test_damaged_files_and_bytes(tmp_path):
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"a\tr\tb\n" * 100)[:-12])
    with pytest.raises(ValueError, match=r"train\.tsv\.gz is damaged"):
        load_triples(tmp_path)
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"a\tr\tb\na\tr\t\xff\n"))
    with pytest.raises(ValueError, match=r"train\.tsv\.gz line 2 is not UTF-8"):
        load_triples(tmp_path)
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress("a\tr\tb\n".encode("utf-16-le")))
    with pytest.raises(ValueError, match=r"train\.tsv\.gz line 1 holds a zero byte"):
        load_triples(tmp_path)
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfa\tr\tb\n"))
    assert set(load_triples(tmp_path).entity_to_id) == {"a", "b"}
    (tmp_path / "test.tsv.xz").write_bytes(b"")  # a download that never began is no empty split
    with pytest.raises(ValueError, match=r"test\.tsv\.xz is damaged, .* \(no bytes\)"):
        load_triples(tmp_path)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no training file, expected train with one of"):
        load_triples(tmp_path)
    write(tmp_path, "train.tsv", "a\tr\tb\n")
    write(tmp_path, "train.txt.gz", "a\tr\tb\n")
    with pytest.raises(ValueError, match=r"2 files of train \(train.tsv, train.txt.gz\)"):
        load_triples(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_triples(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"load_triples: no file .*nowhere"):
        load_triples({"train": tmp_path / "nowhere"})


def test_what_lies_beside_the_files(tmp_path):
    write(tmp_path, "train.tsv.zst", "packed in a way that is not read")
    with pytest.raises(FileNotFoundError, match=r"\.parquet \(or packed\), got train\.tsv\.zst"):
        load_triples(tmp_path)
    write(tmp_path, "train.tsv", "a\tr\tb\n")
    write(tmp_path, "train2id.txt", "ignored")
    (tmp_path / "test.txt").mkdir()
    assert len(load_triples(tmp_path).train) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": "hrx"}, "holds h, r and t once each"),
        ({"columns": ("a", "b")}, "those of head, relation and tail"),
        ({"columns": ("a", "b", "a")}, "three different ones, got a, b, a"),
        ({"delimiter": ""}, "delimiter must be what stands between columns, got ''"),
        ({"unseen": "guess"}, "unseen must be one of keep, drop, error, got 'guess'"),
        ({"literals": "all"}, "literals must be one of drop, keep"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_triples({"train": ROWS}, **arguments)


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_names_of_the_splits(tmp_path, name):
    write(tmp_path, "train.tsv", joined(ROWS, "\t"))
    write(tmp_path, f"{name}.tsv", joined(TEST, "\t"))
    assert load_triples(tmp_path).valid.tolist() == [[0, 0, 3]]


def test_tables_of_labels():
    expected = load_triples({"train": ROWS, "test": TEST})
    for table in (np.array(ROWS), [list(row) for row in ROWS]):
        assert torch.equal(load_triples({"train": table, "test": TEST}).train, expected.train)
    numbers = load_triples({"train": np.array([[10, 1, 9], [9, 1, 10]]), "test": []})
    assert numbers.entity_to_id == {"9": 0, "10": 1}  # by value, not as text
    with pytest.raises(ValueError, match="train must be rows of 3 labels"):
        load_triples({"train": [("a", "r")]})
    for rows, message in (
        ([("a", "r", "b"), ("a", "r", float("nan"))], r"train row 1: the tail is missing \(nan\)"),
        ([("a", "r", "b"), ("a", " ", "b")], r"train row 1: the relation is missing \(' '\)"),
        ([(b"a", "r", "b")], r"train row 0: a label is text or a whole number, got the head b'a'"),
        ([(1, "r", "b"), ("b", "r", True)], "train row 1: a label is text or a whole number, got the tail True"),
        (np.array([[0, 0, 1.5]]), "train row 0: a label is text or a whole number, got the head 0.0"),
        ({("a", "r", "b")}, "train must be rows of 3 labels, got set"),
        ([("a", "r", "b"), ("a", "r")], "train must be rows of 3 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_triples({"train": rows})
    tensor = load_triples({"train": torch.tensor([[10, 1, 9], [9, 1, 10]])})
    assert (tensor.entity_to_id, tensor.train.tolist()) == ({"9": 0, "10": 1}, [[1, 0, 0], [0, 0, 1]])
    with pytest.raises(ValueError, match="keys train, valid and test"):
        load_triples({"train": ROWS, "dev": TEST})


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, columns=["subject", "predicate", "object"])
    expected = load_triples({"train": ROWS}).train
    assert torch.equal(load_triples({"train": frame}).train, expected)
    assert torch.equal(load_triples({"train": frame[["object", "subject", "predicate"]]}).train, expected)
    named = frame.assign(extra=1.0)
    assert torch.equal(load_triples({"train": named}, columns=("subject", "predicate", "object")).train, expected)
    frame.loc[1, "object"] = None
    with pytest.raises(ValueError, match="train row 1: the tail is missing"):
        load_triples({"train": frame})


def test_parquet_or_what_is_missing(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_bytes(b"no parquet")
    try:
        pandas = __import__("pandas")
        __import__("pyarrow")
    except ImportError as error:
        with pytest.raises(ImportError, match=rf"train\.parquet needs pandas and pyarrow \({error.name} is missing\)"):
            load_triples(tmp_path)
        return
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load_triples(tmp_path)
    pandas.DataFrame(ROWS, columns=["subject", "predicate", "object"])[["object", "predicate", "subject"]].to_parquet(
        file
    )
    assert torch.equal(load_triples(tmp_path).train, load_triples({"train": ROWS}).train)


OPENKE = {
    "entity2id.txt": "4\nann\t2\nNew York\t0\nbob 1\ndan\t3\n",
    "relation2id.txt": "2\r\nlikes\t1\r\nknows\t0\r\n",
    "train2id.txt": "3\n1 2 0\n2 0 1\n0\t1\t0\n",
    "test2id.txt": "2\n2 3 0\n1 0 1\n\n",
}


def test_openke_folders_keep_their_ids(tmp_path):
    for name, text in OPENKE.items():
        write(tmp_path, name, text)
    triples = load_triples(tmp_path)
    assert triples.entity_labels == ["New York", "bob", "ann", "dan"]
    assert triples.relation_labels == ["knows", "likes"]
    assert triples.train.tolist() == [[1, 0, 2], [2, 1, 0], [0, 0, 1]]  # head, relation, tail
    assert triples.test.tolist() == [[2, 0, 3], [1, 1, 0]]
    assert triples.valid.shape == (0, 3)
    dropped = load_triples(tmp_path, unseen="drop")
    assert dropped.entity_labels == ["New York", "bob", "ann"]
    assert (dropped.dropped["test"], dropped.test.tolist()) == (1, [[1, 1, 0]])
    with pytest.raises(ValueError, match=r"is OpenKE's, head, tail, relation; got columns='htr'"):
        load_triples(tmp_path, columns="htr")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train2id.txt", "4\n1 2 0\n2 0 1\n", "train2id.txt line 1 counts 4 lines, 2 follow"),
        ("train2id.txt", "1 2 0\n2 0 1\n", "train2id.txt line 1: expected the count of the lines .*, got '1 2 0'"),
        ("train2id.txt", "", "train2id.txt line 1: expected the count of the lines that follow, got an empty file"),
        ("train2id.txt", "0\n", "the training split is empty"),
        (
            "test2id.txt",
            "2\n1 2 0\n\n2 0\n",
            "test2id.txt line 4: expected the ids of head, tail and relation, got '2 0'",
        ),
        ("test2id.txt", "1\n1 2 -1\n", "test2id.txt line 2: expected the ids of head, tail and relation, got '1 2 -1'"),
        ("test2id.txt", "1\n1 4 0\n", "test2id.txt line 2: the tail must be below 4, got 4"),
        (
            "test2id.txt",
            "1\n1 0 3\n",
            "test2id.txt line 2: the relation must be below 2, got 3; the columns are head, t",
        ),
        ("entity2id.txt", "2\nann\t0\nbob\n", "entity2id.txt line 3: expected a name and its id, got 'bob'"),
        ("entity2id.txt", "2\nann\t0\nbob\t0\n", "entity2id.txt line 3: ids are 0 to 1, each once, got 0"),
        ("entity2id.txt", "2\nann\t0\nbob\t2\n", "entity2id.txt line 3: ids are 0 to 1, each once, got 2"),
        ("entity2id.txt", "2\nann\t0\nann\t1\n", "entity2id.txt gives 'ann' more than one id"),
    ],
)
def test_malformed_openke_folders_are_refused_by_line(tmp_path, name, text, message):
    for other, right in OPENKE.items():
        write(tmp_path, other, right)
    write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        load_triples(tmp_path)
    (tmp_path / "relation2id.txt").unlink()
    if name != "entity2id.txt":
        with pytest.raises(FileNotFoundError, match=r"no file .*relation2id\.txt, which an OpenKE folder has"):
            load_triples(tmp_path)


def test_printed_triples_are_one_line():
    triples = load_triples({"train": [(f"e{k}", "r", f"e{k + 1}") for k in range(1000)], "test": TEST}, name="toy")
    text = "Triples(name='toy', entities=1003, relations=2, inverse=True, train=1000, valid=0, test=1)"
    assert repr(triples) == str(triples) == text


def test_unseen_entities_and_relations_by_policy():
    parts = {"train": ROWS, "valid": [("ann", "hates", "bob")], "test": [*TEST, ("bob", "knows", "cid")]}
    kept = load_triples(parts)
    report = kept.describe()
    assert (kept.num_entities, kept.num_relations, len(kept.test)) == (4, 6, 2)
    assert report.unseen_entities == {"train": 0, "valid": 0, "test": 1}
    assert report.unseen_triples == {"train": 0, "valid": 1, "test": 1}
    dropped = load_triples(parts, unseen="drop")
    assert (dropped.num_entities, dropped.num_relations, len(dropped.valid), len(dropped.test)) == (3, 4, 0, 1)
    assert dropped.describe().dropped == {"train": 0, "valid": 1, "test": 1}
    with pytest.raises(ValueError, match="1 triples of valid have an entity or a relation that no training triple has"):
        load_triples(parts, unseen="error")


def test_repeated_lines_are_left_out_in_place_and_counted():
    triples = load_triples({"train": [*ROWS, ROWS[1], ROWS[0], ROWS[1]], "test": [ROWS[2], *TEST]})
    assert triples.train.tolist() == [[1, 0, 0], [0, 1, 2], [2, 0, 1]]
    report = triples.describe()
    assert (report.duplicates["train"], report.seen["test"]) == (3, 1)
    assert "also in train" in str(report)


def test_inverse_triples():
    triples = load_triples({"train": ROWS})
    assert (triples.num_relations, triples.inverse) == (4, True)
    assert triples.directed("train").tolist() == [*triples.train.tolist(), [0, 2, 1], [2, 3, 0], [1, 2, 2]]
    plain = load_triples({"train": ROWS}, inverse=False)
    assert plain.num_relations == 2
    assert torch.equal(plain.directed("train"), plain.train)


def test_names_and_numbers():
    triples = load_triples({"train": ROWS})
    assert triples.entity_labels == ["ann", "bob", "cid"]
    assert triples.entity_ids(["cid", "ann"]).tolist() == [2, 0]
    assert triples.relation_ids("likes").tolist() == [1]
    with pytest.raises(ValueError, match="no entity 'bobb' among 3; like it: bob"):
        triples.entity_ids(["bobb"])
    with pytest.raises(ValueError, match="no relation 'hates' among 2"):
        triples.relation_ids(["hates"])
    with pytest.raises(ValueError, match="a split is one of train, valid, test, got 'dev'"):
        triples.split("dev")


def test_triples_made_by_hand_are_checked():
    one, none, names = torch.tensor([[0, 0, 1]]), torch.zeros(0, 3, dtype=torch.int64), {"a": 0, "b": 1}
    assert Triples(one, none, none, names, {"r": 0}).num_entities == 2
    with pytest.raises(ValueError, match="training split is empty"):
        Triples(none, one, none, names, {"r": 0})
    with pytest.raises(ValueError, match=r"test needs ids below 2 \(entities\) and 1 \(relations\)"):
        Triples(one, none, one + 1, names, {"r": 0})
    with pytest.raises(ValueError, match="must number its 2 names 0, 1"):
        Triples(one, none, none, {"a": 0, "b": 2}, {"r": 0})


@pytest.mark.usefixtures("unchecked")
def test_triples_made_by_hand_are_integers():
    one, none = torch.tensor([[0, 0, 1]]), torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="valid must be int64"):
        Triples(one, one.float(), none, {"a": 0, "b": 1}, {"r": 0})


def test_cardinalities_against_a_slow_count(rng):
    triples = torch.stack([torch.randint(0, n, (300,), generator=rng) for n in (6, 7, 9)], 1)
    triples[:60] = torch.tensor([0, 0, 0]) + torch.arange(60)[:, None] * torch.tensor([0, 0, 1]) % 9
    found = cardinalities(triples, 8)
    rows = set(map(tuple, triples.tolist()))
    for relation in range(7):
        mine = [(h, t) for h, r, t in rows if r == relation]
        tails = len(mine) / len({h for h, _ in mine})
        heads = len(mine) / len({t for _, t in mine})
        assert found[relation] == ("N" if heads > 1.5 else "1") + "-" + ("N" if tails > 1.5 else "1")
    assert found[7] == "1-1"
    three_halves = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 2]])  # exactly 1.5 tails a head
    assert cardinalities(three_halves, 1) == ["1-1"]


def test_distinct_rows_of_numbers_whose_product_overflows():
    large = 2**62
    rows = torch.tensor([[large, 3, -5], [0, 3, -5], [large, 3, -5], [large, 4, -5], [0, 3, -5]])
    assert first_of_each(rows).tolist() == [0, 1, 3]
    assert first_of_each(rows[:0]).tolist() == []
    assert repeated(rows, rows[3:]) == 2


@pytest.mark.parametrize("name", ["nations", "umls", "kinships"])
@pytest.mark.filterwarnings("ignore")
def test_pykeen_datasets_have_its_ids(name):
    datasets = pytest.importorskip("pykeen.datasets")
    theirs, ours = datasets.get_dataset(dataset=name), load_triples(name)
    assert ours.entity_to_id == theirs.training.entity_to_id
    assert ours.relation_to_id == theirs.training.relation_to_id
    for split, factory in (("train", theirs.training), ("valid", theirs.validation), ("test", theirs.testing)):
        assert torch.equal(ours.split(split), factory.mapped_triples)
    with pytest.raises(FileNotFoundError, match="PyKEEN has no dataset of that name"):
        load_triples("no-such-graph")


def test_without_pykeen_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pykeen.datasets", None)
    with pytest.raises(ImportError, match=r"no folder umls, .* pip install 'tnlayers\[kg\]'"):
        load_triples("umls")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts", "entities", "unseen"),
    [("umls", (5216, 652, 661), 135, 0), ("wn18rr", (86835, 3034, 3134), 40943, 384)],
)
def test_the_graphs_of_the_literature(name, counts, entities, unseen):
    if not (DATA / name).exists():
        pytest.skip("no shared data")
    triples = load_triples(DATA / name)
    assert tuple(len(triples.split(split)) for split in ("train", "valid", "test")) == counts
    assert triples.num_entities == entities
    assert triples.num_entities - len(triples.train[:, (0, 2)].unique()) == unseen


def test_numbers_and_their_text_are_one_name():
    triples = load_triples({"train": [(1, 0, 10), (10, 0, 2)], "test": [("1", "0", "2")]})
    assert triples.entity_to_id == {"1": 0, "10": 1, "2": 2}
    assert triples.relation_to_id == {"0": 0}
    assert triples.test.tolist() == [[0, 0, 2]]


def test_missing_labels_of_pandas_are_named():
    pandas = pytest.importorskip("pandas")
    heads = pandas.array(["a", None], dtype="string")
    with pytest.raises(ValueError, match="train row 1: the head is missing"):
        load_triples({"train": pandas.DataFrame({"h": heads, "r": ["r", "r"], "t": ["b", "c"]})})


def test_a_table_alone_is_refused():
    with pytest.raises(TypeError, match=r"a mapping of splits, got list; pass \{'train': ...\} with it"):
        load_triples(ROWS)
