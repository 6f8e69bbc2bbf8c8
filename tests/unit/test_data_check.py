"""`data check`: each planted fault is found with its code and line, and the counts always add up."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.check_data import Lengths, check, lengths_of, shown
from gemwright.data.codes import CODES
from gemwright.data.duplicates import Fingerprints
from gemwright.data.read import read_examples
from gemwright.data.screen import CONTROL_TOKEN
from gemwright.data.secrets import secrets_in
from gemwright.data.shapes import entry_of
from gemwright.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["river", "stone", "cloud", "light", "forest", "silver", "morning", "engine", "paper", "garden", "bridge"]


def pair(prompt: str, completion: str = "yes") -> str:
    return json.dumps({"prompt": prompt, "completion": completion})


def sentence(seed: int, words: int = 60) -> str:
    made = random.Random(seed)
    return " ".join(made.choice(WORDS) + str(made.randrange(99)) for _ in range(words))


def found_in(path: Path, **more: Any) -> list[tuple[str, int]]:
    return [(f["code"], f["line"]) for f in check([path], **more).row()["findings"]]


def written(folder: Path, *lines: str, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
    return path


GOOD = pair("one thing")
PLANTED = [
    ("{broken", "D011"),
    ("[1]", "D015"),
    ('{"a": 1}', "D016"),
    ('{"prompt": 1, "completion": "b"}', "D017"),
    (pair(" "), "D020"),
    ('{"messages": [{"role": "bird", "content": "a"}]}', "D021"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "D022"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "D023"),
    (pair("a\0"), "D030"),
    (pair("a\ud83d"), "D031"),
    (pair("lost \ufffd here"), "D032"),
    (pair("bell \x07 here"), "D033"),
    (pair("a <end_of_turn> b"), "D034"),
    (pair("a <unused6241> b"), "D034"),
    (pair("a <start_of_image> b"), "D035"),
    (GOOD, "D040"),
    (pair("\u0432o\u0434a"), "D060"),
    (pair("key AKIAIOSFODNN7EXAMPLE"), "D070"),
]


@pytest.mark.parametrize(("line", "code"), PLANTED)
def test_a_planted_fault_is_found_alone(tmp_path: Path, line: str, code: str) -> None:
    path = written(tmp_path, GOOD, line, pair("another"))
    checked = check([path])
    (finding,) = checked.row()["findings"]
    assert (finding["code"], finding["line"], finding["file"]) == (code, 2, str(path))
    assert finding["severity"] == CODES[code].severity and "\n" not in finding["message"]
    bad = CODES[code].severity == "error"
    tally = checked.tally
    assert (tally.read, tally.kept, tally.dropped) == (3, 3 - bad, int(bad))
    assert checked.is_trainable != bad


def test_what_is_said_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert found_in(tmp_path / "empty.jsonl") == [("D001", 0)]
    assert found_in(written(tmp_path, "\ufeff" + GOOD)) == [("D005", 1)]
    mixed = written(tmp_path, GOOD, pair("b"), '{"instruction": "c", "output": "d"}')
    checked = check([mixed])
    assert checked.format == "mixed" and checked.is_trainable
    assert [(f["code"], f["line"]) for f in checked.row()["findings"]] == [("D007", 3)]
    choice = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    assert found_in(written(tmp_path, choice)) == [("D006", 1)] and not check([tmp_path / "a.jsonl"]).is_trainable
    text = check([written(tmp_path, "some words", name="a.txt")])
    assert text.is_trainable and text.format == "text"


def test_a_damaged_file_counts_what_was_read(tmp_path: Path) -> None:
    lines = [pair(sentence(seed)) for seed in range(500)]
    whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    checked = check([tmp_path / "a.jsonl.gz", written(tmp_path, GOOD)])
    tally = checked.tally
    assert 0 < tally.kept < 500 and tally.dropped == 0 and not checked.is_trainable
    assert dict(tally.counts) == {"D002": 1}
    assert [file["read"] for file in checked.row()["files"]] == [tally.kept - 1, 1]


def test_near_duplicates(tmp_path: Path) -> None:
    lines = [pair(sentence(seed)) for seed in range(300)]
    lines[100] = pair(sentence(7).replace(sentence(7).split()[30], "changed"))
    lines[200] = lines[9]
    lines[250] = pair(sentence(8, 30) + " " + sentence(9, 30))  # half alike is not near
    path = written(tmp_path, *lines)
    checked = check([path])
    findings = {f["code"]: f for f in checked.row()["findings"]}
    assert dict(checked.tally.counts) == {"D040": 1, "D041": 1}
    assert findings["D041"]["line"] == 101 and "nearly repeats line 8" in findings["D041"]["message"]
    assert findings["D040"]["line"] == 201 and findings["D040"]["message"] == "repeats line 10"


def shared(a: str, b: str) -> float:
    """What two texts have in common of their pieces of eight characters, exactly."""
    mine, theirs = ({text[at : at + 8] for at in range(len(text) - 7)} for text in (a, b))
    return len(mine & theirs) / len(mine | theirs)


def test_likeness_is_found_by_what_is_shared() -> None:
    """docs/data.md's shares, of fewer pairs."""
    made = random.Random(5)
    much, little = [], []
    for _ in range(300):
        text = "".join(made.choices("abcdefghijklmnopqrstuvwxyz ", k=1200))
        changed = list(text)
        for _ in range(made.choice((1, 3, 6, 36))):
            changed[made.randrange(1200)] = "X"
        seen = Fingerprints()
        for each in (text, "".join(changed)):
            seen.add(entry_of({"text": each}, ""))
        (much if shared(text, "".join(changed)) > 0.9 else little).append(bool(seen.pairs()[1]))
    assert len(much) > 100 and sum(much) / len(much) > 0.95
    assert len(little) > 50 and sum(little) / len(little) < 0.02


def test_likeness_is_bounded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Fingerprints(most_signatures=3)
    for text in (sentence(1), sentence(2), sentence(1), sentence(1) + "!", sentence(2)):
        seen.add(entry_of({"text": text}, ""))
    exact, near = seen.pairs()
    assert [(p.at, p.of) for p in exact] == [(2, 0), (4, 1)] and near == [] and seen.is_partial


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_exact_duplicates_and_overlap(rows: list[int], theirs: list[int]) -> None:
    mine, other = Fingerprints(), Fingerprints()
    for seen, numbers in ((mine, rows), (other, theirs)):
        for number in numbers:
            seen.add(entry_of({"text": sentence(number, 12)}, ""))
    exact, near = mine.pairs()
    assert [(p.at, p.of) for p in exact] == [(at, rows.index(n)) for at, n in enumerate(rows) if n in rows[:at]]
    assert near == []
    overlap = [(p.at, p.of) for p in mine.pairs_with(other)]
    assert overlap == [(at, theirs.index(n)) for at, n in enumerate(rows) if n in theirs]


def test_validation_overlap(tmp_path: Path) -> None:
    data = written(tmp_path, *(pair(sentence(seed)) for seed in range(20)))
    held_out = written(tmp_path, pair("new"), pair(sentence(3)), pair(sentence(5) + "."), name="val.jsonl")
    checked = check([data], validation=held_out)
    assert checked.overlap == 2 and checked.is_trainable
    assert [(f["code"], f["line"]) for f in checked.row()["findings"]] == [("D042", 4), ("D042", 6)]
    heard: list[str] = []
    with pytest.raises(InputError, match="no usable row in the validation data"):
        check([data], validation=written(tmp_path, "{", name="bad.jsonl"), report=heard.append)
    assert len(heard) == 1 and "1 faults in the validation data" in heard[0]


def test_lengths(tmp_path: Path, real_model: Path) -> None:
    path = written(tmp_path, pair("short"), pair(sentence(1, 400), "the answer"), pair(sentence(2, 40), "no"))
    lengths: Lengths = lengths_of(str(real_model), seq=200)
    checked = check([path], lengths=lengths)
    (finding,) = checked.row()["findings"]
    assert (finding["code"], finding["line"]) == ("D050", 2)
    assert "the cut would be in message 1 before" in finding["message"]
    tokens = checked.row()["tokens"]
    assert tokens["longest_line"] == 2 and tokens["over_long"] == 1
    assert tokens["cut"] == tokens["longest"] - 200 and tokens["seq"] == 200
    assert (checked.tally.kept, checked.tally.dropped) == (2, 1)
    assert tokens["labelled"] == 2 * 2  # "yes" and "no", and the end of each turn
    assert checked.next([path], None)[-2:] == ("--seq", tokens["longest"])
    assert f"{lengths.over_long} rows over 200" in shown(checked, show=3, colour=False)


def test_control_tokens_are_those_of_the_vocabulary(real_model: Path) -> None:
    from gemwright.text.tokenizer import CONTROL, UNKNOWN
    from gemwright.weights.gguf_reader import open_gguf

    metadata = open_gguf(real_model).metadata
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    for text, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True):
        assert bool(CONTROL_TOKEN.fullmatch(text)) == (kind in (CONTROL, UNKNOWN))


SECRETS = [
    ("AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
    ("ghp_" + "a1B2" * 9, "a GitHub token"),
    ("github_pat_" + "a1B2" * 10, "a GitHub token"),
    ("sk-proj-" + "a1B2c3" * 8, "an API key (sk-)"),
    ("hf_" + "aBcD" * 9, "a Hugging Face token"),
    ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ("-----BEGIN PRIVATE KEY-----", "a private key"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "a JSON web token"),
    ('password = "hunter2abc"', "a password or key that is set"),
    ("API_KEY: a1b2c3d4e5", "a password or key that is set"),
    ("postgres://me:hunter2abc@host/db", "a password in an address"),
]
HARMLESS = """sk-learn is a library and sk-something-long-with-words-only|password: ********
password = <your password>|the token: a word|AKIA is short|api_key = os.environ["KEY1234567"]
-----BEGIN CERTIFICATE-----|https://example.org/a:b@c|secret=${SECRET_1234567}
Password: forgotten|eyJ and eyJ|пароль: забыт совсем|token = getToken(12345678)"""


@pytest.mark.parametrize(("secret", "kind"), SECRETS)
def test_secrets_are_found_and_never_shown(tmp_path: Path, secret: str, kind: str) -> None:
    ((told, masked),) = secrets_in(f"see {secret} there")
    assert told == kind and secret not in masked and len(masked.split("...")[0]) <= 4
    checked = check([written(tmp_path, pair(f"see \ufffd {secret} there"))])
    assert dict(checked.tally.counts) == {"D032": 1, "D070": 1}
    long = max(secret.replace('"', " ").split(), key=len)
    assert long not in json.dumps(checked.row()) and long not in shown(checked, show=3, colour=True)


@pytest.mark.parametrize("text", [text for line in HARMLESS.splitlines() for text in line.split("|")])
def test_what_is_no_secret(text: str) -> None:
    assert list(secrets_in(text)) == []


LINES = st.sampled_from([GOOD, *(line for line, _ in PLANTED), "", "  ", pair("c", "d")]) | st.text(max_size=20)


@given(st.lists(LINES, max_size=12))
@settings(max_examples=60)
def test_read_is_kept_and_dropped_by_code(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = written(tmp_path_factory.getbasetemp(), *(line.replace("\n", " ") for line in lines), name="p.jsonl")
    row = check([path]).row()
    assert row["read"] == row["kept"] + row["dropped"] == sum(file["read"] for file in row["files"])
    assert row["dropped"] == sum(row["dropped_by_code"].values())
    assert sum(row["formats"].values()) == row["kept"]
    for code, count in row["dropped_by_code"].items():
        assert row["counts"][code] == count and CODES[code].severity == "error"
    assert row["trainable"] == (row["kept"] > 0 and not any(CODES[c].severity == "error" for c in row["counts"]))
    if row["trainable"]:
        assert len(read_examples(path)) == row["kept"]
    else:
        with pytest.raises(InputError):
            read_examples(path)


def test_the_page_names_every_code_and_no_other() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for code, means in CODES.items():
        assert f"| {code} | {means.severity} | {means.title} |" in page, code


Run = Callable[..., Any]


def test_the_verb(gemwright: Run, tmp_path: Path) -> None:
    good = written(tmp_path, GOOD, pair("b"))
    done = gemwright("data", "check", good, "--json")
    assert done.returncode == 0 and "next: gemwright tune" in done.stderr
    row = json.loads(done.stdout)
    assert {"format", "read", "kept", "dropped", "findings", "tokens"} <= row.keys()
    assert (row["format"], row["read"], row["kept"], row["dropped"]) == ("prompt_completion", 2, 2, 0)
    assert (row["container"], row["compression"], row["tokens"]) == ("jsonl", None, {})

    bad = written(tmp_path, GOOD, "{", pair("\u0432o\u0434a"), name="bad.jsonl")
    done = gemwright("data", "check", bad, "--repair", tmp_path / "r.jsonl")
    assert done.returncode == 2 and not (tmp_path / "r.jsonl").exists()
    assert f"next: gemwright data convert {bad} kept.jsonl --drop-bad" in done.stderr
    assert "error   D011" in done.stdout and "\x1b" not in done.stdout and "was not written" in done.stderr
    (finding, other) = json.loads(gemwright("data", "check", bad, "--json").stdout)["findings"]
    assert (finding["line"], finding["severity"], other["code"]) == (2, "error", "D060")

    fine = written(tmp_path, GOOD, pair("\u0432o\u0434a"), name="fine.jsonl")
    done = gemwright("data", "check", fine, "--repair", tmp_path / "r.jsonl", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["repaired"]["repaired"] == 1
    assert read_examples(tmp_path / "r.jsonl")[1].messages[0]["content"] == "\u0432\u043e\u0434\u0430"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.jsonl",), "no such file"),
        (("x.jsonl", "--seq", "64"), "--model"),
        (("x.jsonl", "--repair", "a.doc"), "written"),
    ],
)
def test_wrong_usage_of_the_verb(gemwright: Run, words: tuple[str, ...], said: str) -> None:
    done = gemwright("data", "check", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
