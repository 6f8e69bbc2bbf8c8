"""Tokenising beside transformers on the same text and threads; a gigabyte of JSONL prepared under a watch on memory.

    apt-get download debian-reference-en debian-reference-ja debian-reference-zh-cn debian-faq-ru \\
        installation-guide-amd64 manpages manpages-dev manpages-ru manpages-ja manpages-zh manpages-de \\
        manpages-fr manpages-es manpages-pl manpages-pt-br
    for file in *.deb; do dpkg -x "$file" texts; done
    python benchmarks/data.py --texts texts                          # all of it
    python benchmarks/data.py --texts texts --rounds 1 --gb 0.05     # a quick look

The texts are real ones in 20 languages (those packages), Python's own library, the demo's chats, and all distinct
words of these, each once. Each contestant is a process of its own; on each kind of text they take turns, so that a
noisy machine is noisy for all, and a round takes a part of the text that none has seen. gemwright is there twice: as
it is once it had much text, in as many processes as there are threads, and as it is for a small set of data (its first
four million characters), in one process, since `data prepare` starts none for these. transformers' tokenizer is made of
the same pieces: Gemma's class, the pairs that its converter would make, and the user-defined pieces as added tokens. It
is called as it is fastest: on batches, with as many threads. What any of them needs to start is not counted.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemwright.text.pieces import Encoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

KIND_CHARACTERS = 6_000_000
# How a language's pages are known by their paths.
LANGUAGES = {"en": r"\.en\.html$|/en/|/man/man\d/", "ru": r"\.ru\.html$|/ru/", "ja": r"\.ja\.html$|/ja/"}
LANGUAGES["zh-cn"] = r"\.zh-cn\.html$|/zh-cn/|/zh_CN/"
CONTESTANTS = ("gemwright", "gemwright_small", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder where the packages were unpacked")
    parser.add_argument("--model", default="270m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file to prepare; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    from gemwright.weights.pull import resolve_model

    model, load = resolve_model(options.model), os.getloadavg()[0]
    kinds = {kind: cut(text) for kind, text in texts(options.texts).items()}
    rows = []
    for threads in sorted({1, options.threads}):
        rows += tokenising(model, kinds, threads, options.rounds)
    rows += scaling(rows, options.threads)
    if options.gb:
        rows.append(preparing(model, kinds, options.gb))
    write(rows, options, f"{load:.1f}, {os.getloadavg()[0]:.1f}")


def texts(folder: Path) -> dict[str, str]:
    """Kinds of text, each of up to KIND_CHARACTERS characters."""
    from gemwright.data.cldr import split_path
    from gemwright.data.read import iter_examples

    rng = random.Random(0)
    pages = {path: plain(path) for path in sorted(folder.rglob("*.html"))}
    pages |= {path: manual(path) for path in sorted(folder.rglob("man/**/*.gz")) if not path.is_symlink()}
    of = {
        language: "".join(text for path, text in pages.items() if re.search(pattern, path.as_posix()))
        for language, pattern in LANGUAGES.items()
    }
    shuffled = list(pages.values())
    rng.shuffle(shuffled)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chats = [turn["content"] for example in iter_examples(split_path("train")) for turn in example.messages]
    kinds = {
        "English": of["en"],
        "Russian": of["ru"],
        "Japanese": of["ja"],
        "Chinese": of["zh-cn"],
        "20 languages": "".join(shuffled),
        "code": "".join(path.read_text(encoding="utf-8") for path in library),
        "the demo's chats": "\n".join(chats),
    }
    kinds = {kind: text[:KIND_CHARACTERS] for kind, text in kinds.items()}
    distinct = sorted({word for text in kinds.values() for word in text.split()})
    rng.shuffle(distinct)
    return kinds | {"distinct words": " ".join(distinct)[:KIND_CHARACTERS]}


def plain(path: Path) -> str:
    """The text of a page, runs of spaces as one but line breaks kept."""
    page = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", path.read_text(encoding="utf-8", errors="replace"))
    return re.sub(r"[ \t]+", " ", html.unescape(page))


def manual(path: Path) -> str:
    """The text of a manual page without its commands."""
    page = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    lines = [line for line in page.splitlines() if not line.startswith((".", "'"))]
    return re.sub(r"\\f\[?\w+\]?|\\&", "", "\n".join(lines)).replace("\\-", "-") + "\n"


def cut(text: str) -> list[str]:
    """Pieces as long as turns of a chat are: 20 to 2,000 characters."""
    rng, pieces, start = random.Random(0), [], 0
    while start < len(text):
        size = int(20 * 100 ** rng.random())
        pieces.append(text[start : start + size])
        start += size
    return pieces


def tokenising(model: Path, kinds: dict[str, list[str]], threads: int, rounds: int) -> list[dict]:
    """One row for each kind of text: MB of UTF-8 a second of each contestant, and the ratio in each round."""
    os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true")
    spawn = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in CONTESTANTS:
        ends[name], theirs = spawn.Pipe()
        spawn.Process(target=contestant, args=(name, model, threads, theirs), daemon=False).start()
    rows = []
    for kind, pieces in kinds.items():
        speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        differing = tokens = 0
        for turn in range(rounds + 1):  # the first is not counted
            part = pieces[turn :: rounds + 1]
            size, ids = sum(len(piece.encode()) for piece in part) / 1e6, {}
            for name in CONTESTANTS[:: 1 if turn % 2 else -1]:
                ends[name].send(part)
                seconds, ids[name] = ends[name].recv()
                speeds[name] += [size / seconds] if turn else []
            tokens += sum(map(len, ids["gemwright"]))
            differing += sum(a != b or a != c for a, b, c in zip(*ids.values(), strict=True))
        size = sum(len(piece.encode()) for piece in pieces) / 1e6
        theirs = speeds["transformers"]
        row = {
            "what": "tokenising",
            "kind": kind,
            "threads": threads,
            "mb": size,
            "tokens": tokens,
            "texts": len(pieces),
        }
        row |= {f"{name}_mb_s": spread(each) for name, each in speeds.items()}
        for name, ratio in (("gemwright", "ratio"), ("gemwright_small", "ratio_small")):
            row[ratio] = spread([a / b for a, b in zip(speeds[name], theirs, strict=True)])
        row["texts_with_other_ids"] = differing
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    for end in ends.values():
        end.send("end")
    return rows


def contestant(name: str, model: Path, threads: int, end: Connection) -> None:
    """Answer texts with the seconds that they took and their ids, until "end"."""
    if name == "transformers":
        theirs = transformers_tokenizer(model)
        answer(end, 256, lambda batches: [ids for batch in batches for ids in theirs(batch)])
    else:
        ours(model, 1 if name == "gemwright_small" else threads, end, quick=name == "gemwright")


def ours(model: Path, threads: int, end: Connection, quick: bool) -> None:
    encoder = encoder_of(model)
    if threads == 1:
        begin(encoder, quick)
        answer(end, 256, lambda batches: [ids for batch in batches for ids in in_worker(batch)])
        return
    with ProcessPoolExecutor(threads, multiprocessing.get_context("spawn"), begin, (encoder, quick)) as pool:
        answer(end, 256, lambda batches: [ids for batch in pool.map(in_worker, batches) for ids in batch])


def answer(end: Connection, size: int, encode: Callable[[list[list[str]]], list[Sequence[int]]]) -> None:
    while (asked := end.recv()) != "end":
        batches = [asked[at : at + size] for at in range(0, len(asked), size)]
        start = time.perf_counter()
        ids = encode(batches)
        end.send((time.perf_counter() - start, [list(each) for each in ids]))


def begin(encoder: Encoder, quick: bool) -> None:
    """Past the first four million characters, or far from there."""
    global _encoder
    _encoder = encoder
    if quick:
        encoder.hasten()
    else:
        encoder._before_quick = math.inf


def in_worker(batch: list[str]) -> list[array[int]]:
    """Ids as the store has them: packed."""
    return [array("I", _encoder(text)) for text in batch]


def encoder_of(model: Path) -> Encoder:
    from gemwright.text.tokenizer import Tokenizer
    from gemwright.weights.gguf_reader import open_gguf

    return Tokenizer.from_model(open_gguf(model)).encode


def transformers_tokenizer(model: Path) -> Callable[[list[str]], list[list[int]]]:
    """Gemma's class in transformers over the file's pieces."""
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    from gemwright.text.pieces import NORMAL, USER_DEFINED
    from gemwright.weights.gguf_reader import open_gguf

    metadata = open_gguf(model).metadata
    tokens = [str(text) for text in metadata["tokenizer.ggml.tokens"]]
    types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    scores = [float(score) for score in metadata["tokenizer.ggml.scores"]]
    normal = {text: id_ for id_, text in enumerate(tokens) if types[id_] == NORMAL}
    pairs = []
    for piece, id_ in normal.items():
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs += [(-scores[id_], normal[a], normal[b], (a, b)) for a, b in halves if a in normal and b in normal]
    vocabulary = {text: id_ for id_, text in enumerate(tokens)}
    made = GemmaTokenizer(vocab=vocabulary, merges=[pair for *_, pair in sorted(pairs)])
    defined = [text for id_, text in enumerate(tokens) if types[id_] == USER_DEFINED]
    made.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined])
    return lambda batch: made(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def scaling(rows: list[dict], threads: int) -> list[dict]:
    """How much faster each contestant is with all threads than with one."""
    of = {(row["kind"], row["threads"]): row for row in rows}
    kinds = [kind for kind, at in of if at == 1]
    gained = {
        name: spread([of[k, threads][f"{name}_mb_s"]["median"] / of[k, 1][f"{name}_mb_s"]["median"] for k in kinds])
        for name in ("gemwright", "transformers")
    }
    return [{"what": "scaling", "threads": threads} | gained] if threads > 1 else []


def preparing(model: Path, kinds: dict[str, list[str]], gigabytes: float) -> dict:
    """`gemwright data prepare` on a file of conversations cut from all texts, as a process with those it starts."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        write_chats(data, [piece for pieces in kinds.values() for piece in pieces if piece.strip()], gigabytes * 1e9)
        command = [sys.executable, "-m", "gemwright", "data", "prepare", str(data), "--model", str(model)]
        command += ["--seq", "4096", "--json"]
        environment = os.environ | {"GEMWRIGHT_HOME": folder, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        runs = [watched(command, environment) for _ in range(2)]
        row = {"what": "preparing", "bytes": data.stat().st_size, "peak_rss_bytes": runs[0][1], "seconds": runs[0][0]}
        row |= {"again_seconds": runs[1][0], "again_peak_rss_bytes": runs[1][1]}
        return row | {key: value for key, value in runs[0][2].items() if key not in ("data", "store")}


def write_chats(path: Path, pieces: list[str], size: float) -> None:
    rng, written = random.Random(0), 0
    with path.open("wb") as file:
        while written < size:
            roles = ("user", "assistant") * rng.choice((1, 1, 2, 3))
            turns = [{"role": role, "content": rng.choice(pieces)} for role in roles]
            written += file.write(json.dumps({"messages": turns}, ensure_ascii=False).encode() + b"\n")


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, int, dict]:
    """(seconds, the most resident bytes of the process and all below it at one time, its JSON)"""
    import psutil

    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    above = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(resident(above)))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, peak, json.loads(process.stdout.read())


def resident(above) -> Iterator[int]:
    import psutil

    try:
        for process in (above, *above.children(recursive=True)):
            yield process.memory_info().rss
    except psutil.Error:  # ended meanwhile
        return


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def write(rows: list[dict], options: argparse.Namespace, load: str) -> None:
    from importlib.metadata import version

    from gemwright.host import read_cpu

    cpu = read_cpu([], Path("/"), {}).name or platform.machine()
    about = {
        "command": f"python benchmarks/data.py --texts texts --rounds {options.rounds} --gb {options.gb:g}",
        "cpu": cpu,
        "threads_here": options.threads,
        "load": load,
        "python": platform.python_version(),
        **{name: version(name) for name in ("sentencepiece", "kitoken", "tokenizers", "transformers")},
        "date": date.today().isoformat(),
    }
    rows = [about | row for row in rows]
    stem = options.out / f"data_{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}_{about['date']}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stem.with_suffix(".md").write_text(readable(rows, about), encoding="utf-8")
    print("".join(json.dumps(row) + "\n" for row in rows), end="")


def readable(rows: list[dict], about: dict) -> str:
    lines = [
        f"# Tokenising and preparing data, {about['date']}",
        "",
        f"`{about['command']}` on {about['cpu']}, {about['threads_here']} threads; load at start and end "
        f"{about['load']}; Python {about['python']}, sentencepiece {about['sentencepiece']}, "
        f"kitoken {about['kitoken']}, transformers {about['transformers']}, tokenizers {about['tokenizers']}.",
        "MB/s of UTF-8 text; ratio of the same round, median (lowest to highest). Texts of 20 to 2,000 characters.",
        "",
        "| text | MB | threads | gemwright | small set | transformers | ratio | ratio, small set | other ids |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["what"] == "tokenising":
            cells = [row["kind"], f"{row['mb']:.2f}", str(row["threads"])]
            cells += [f"{row[f'{name}_mb_s']['median']:.2f}" for name in CONTESTANTS]
            ratios = (row["ratio"], row["ratio_small"])
            cells += [f"{each['median']:.2f} ({each['min']:.2f} to {each['max']:.2f})" for each in ratios]
            lines.append("| " + " | ".join([*cells, f"{row['texts_with_other_ids']} of {row['texts']}"]) + " |")
    for row in rows:
        if row["what"] == "scaling":
            gains = (f"{name} {row[name]['median']:.2f} times" for name in ("gemwright", "transformers"))
            lines += ["", f"{row['threads']} threads against one, median over the texts: {', '.join(gains)}."]
        if row["what"] == "preparing":
            lines += [
                "",
                f"`gemwright data prepare` of {row['bytes'] / 1e9:.2f} GB of JSONL ({row['examples']} examples, "
                f"{row['tokens']} tokens): {row['seconds']:.0f} s with {row['workers']} workers, peak "
                f"{row['peak_rss_bytes'] / 1e6:.0f} MB resident in all processes together; again: "
                f"{row['again_seconds']:.1f} s, {row['again_peak_rss_bytes'] / 1e6:.0f} MB. "
                f"Rows of {row['seq']} tokens are {row['packing']['efficiency']:.2%} full.",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
