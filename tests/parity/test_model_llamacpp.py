"""Greedy tokens of our decoder and of llama.cpp on the same real weights; where they part, how near the choice was."""

from __future__ import annotations

import dataclasses
import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rounding import RoundingResidency, ShakenPlain, ShakenRounding

from gemwright.data.read import read_examples
from gemwright.engines.llamacpp import LlamaCpp
from gemwright.model.decoder import Gemma
from gemwright.model.residency import UnpackedResidency
from gemwright.spec import BOS, END_OF_TURN, EOS
from gemwright.text.tokenizer import Tokenizer
from gemwright.weights.gguf_reader import open_gguf
from gemwright.weights.gguf_writer import Piece, write_gguf_model
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.quants import pack, unpack

PROMPT, NEW = 64, 64
TEXTS = [
    "The Industrial Revolution began in Britain in the second half of the eighteenth century, when the invention of the"
    " spinning jenny, the water frame and the steam engine moved the making of cloth from cottages into mills. Towns"
    " grew around the mills, canals and railways joined the towns, and within two generations a country of farmers"
    " became a country of workers who",
    "import json\nfrom pathlib import Path\n\n\ndef load(path: Path) -> dict[str, list[int]]:\n    '''Read a file of"
    " numbers and give back the even ones, sorted, under the name that each list has in the file.'''\n    raw ="
    " json.loads(path.read_text())\n    return {name: sorted(x for x in xs if x % 2 == 0) for name, xs in raw.items()}",
    "Россия — крупнейшая по площади страна мира. Она расположена в Восточной Европе и Северной Азии и омывается водами"
    " двенадцати морей трёх океанов. Столица России — город Москва, второй по величине город — Санкт-Петербург. На"
    " территории страны проживает более ста девяноста народов, каждый из которых отличается своими обычаями и",
]
Greedy = Callable[[list[int]], list[int]]


@contextmanager
def llamacpp(model: Path) -> Iterator[Greedy]:
    """llama.cpp's greedy continuation of token ids, asked through the server of the wheel."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))

    def greedy(ids: list[int]) -> list[int]:
        body = {"prompt": ids, "n_predict": NEW, "temperature": 0, "top_k": 1, "return_tokens": True}
        connection.request("POST", "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = json.load(connection.getresponse())
        return [token for token in answer["tokens"] if token not in (EOS, END_OF_TURN)]

    yield greedy
    connection.close()


@pytest.fixture(scope="module")
def prompts(real_model: Path) -> list[list[int]]:
    """Twenty of exactly 64 tokens: prose, code, Russian, and the demo's data in many languages."""
    encode = Tokenizer.from_model(open_gguf(real_model)).encode
    examples = read_examples(Path(__file__).parents[2] / "gemwright" / "data" / "cldr" / "train.jsonl")
    lines = [" ".join(turn["content"] for turn in example.messages) for example in examples]
    texts = TEXTS + ["\n".join(lines[at : at + 12]) for at in range(0, 17 * 60, 60)]
    made = [[BOS, *encode(text)][:PROMPT] for text in texts]
    assert len(made) == 20 and {len(ids) for ids in made} == {PROMPT}
    return made


@torch.inference_mode()
def parting(ours: Gemma, prompt: Sequence[int], theirs: Sequence[int]) -> tuple[int, float] | None:
    """(tokens that agree, how much our logits prefer ours to theirs there) of greedy continuations; None if the same.

    Up to the first difference both have the same prefix, so one pass over theirs tells what ours would have been.
    """
    if not theirs:
        return None
    h = ours.hidden([*prompt, *theirs])[len(prompt) - 1 : -1]
    logits = h @ ours.residency.head_rows(0, ours.residency.vocab).t()
    for at, (row, token) in enumerate(zip(logits, theirs, strict=True)):
        if int(row.argmax()) != token:
            return at, float(row.max() - row[token])
    return None


def compare(model: Path, prompts: Sequence[list[int]]) -> list[tuple[int, float]]:
    """The partings over `prompts`; the model's weights are those of the file, computed in fp32 by ours."""
    ours = Gemma.load(open_model(model), torch.float32)
    with llamacpp(model) as greedy:
        continued = [greedy(prompt) for prompt in prompts]
    assert sum(map(len, continued)) > 0.5 * NEW * len(prompts)
    found = [parting(ours, prompt, theirs) for prompt, theirs in zip(prompts, continued, strict=True)]
    parted = [difference for difference in found if difference is not None]
    print(f"{len(prompts) - len(parted)} of {len(prompts)} the same; the others after (tokens, margin): {parted}")
    return parted


def as_fp32(file: ModelFile, source: Path, path: Path) -> Path:
    """The same weights unpacked, so that llama.cpp computes with them and not with activations rounded to 8 bits."""

    def piece(ours: str) -> Piece:
        stored = file.tensors[ours]
        plain = Piece.of(ours, stored)
        return Piece(plain.name, plain.shape, "F32", lambda: pack(unpack(stored.data, stored.qtype), "F32"))

    pieces = [piece(ours) for ours in file.tensors]
    write_gguf_model(path, file.spec, pieces, tokenizer_from=open_gguf(source), file_type="F32")
    return path


def test_greedy_tokens_of_three_prompts(real_model: Path, prompts: list[list[int]]) -> None:
    """With packed weights llama.cpp rounds activations to 8 bits: near choices may fall otherwise, clear ones not."""
    assert all(margin < 0.6 for _, margin in compare(real_model, prompts[:3]))


@pytest.mark.slow
def test_greedy_tokens_of_twenty_prompts(real_model: Path, prompts: list[list[int]]) -> None:
    assert all(margin < 0.6 for _, margin in compare(real_model, prompts))


@pytest.mark.slow
def test_greedy_tokens_of_twenty_prompts_with_unpacked_weights(
    real_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    parted = compare(as_fp32(open_model(real_model), real_model, tmp_path / "fp32.gguf"), prompts)
    assert len(parted) <= 1 and all(margin < 0.05 for _, margin in parted)


def first_layer(file: ModelFile, source: Path, path: Path) -> ModelFile:
    """The model cut down to its first layer, the packed bytes as they are; also written to `path`."""
    kept = {name: stored for name, stored in file.tensors.items() if not name[0].isdigit() or name.startswith("0.")}
    cut = dataclasses.replace(file, spec=dataclasses.replace(file.spec, layers=1), tensors=kept)
    pieces = [Piece.of(name, stored) for name, stored in kept.items()]
    write_gguf_model(path, cut.spec, pieces, tokenizer_from=open_gguf(source), is_random=True)
    return cut


def test_rounding_as_llama_cpp_does_gives_its_values(
    real_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """One layer and one token after BOS, before rounding can feed on itself: the same rounding, the same values."""
    file = first_layer(open_model(real_model), real_model, tmp_path / "cut.gguf")
    pairs = [[BOS, token] for token in prompts[0][1:33]]
    with LlamaCpp(tmp_path / "cut.gguf", context=64, threads=1) as engine:
        theirs = torch.tensor([engine.score(pair)[0] for pair in pairs])

    def error(ours: Gemma) -> float:
        found = torch.cat([ours.logits(pair).log_softmax(1)[0, pair[1:]] for pair in pairs])
        return float((found - theirs).square().mean().sqrt())

    plain, rounded = error(Gemma.load(file, torch.float32)), error(Gemma(RoundingResidency(file)))
    print(f"rms difference to llama.cpp: {plain:.4f} without its rounding, {rounded:.4f} with it")
    assert rounded < 0.1 * plain


@pytest.mark.slow
def test_rounding_makes_near_choices_a_matter_of_the_last_bit(real_model: Path, prompts: list[list[int]]) -> None:
    """A millionth on the embeddings moves no choice in fp32; with activations rounded it moves as many as rounding."""
    file = open_model(real_model)
    with llamacpp(real_model) as greedy:
        texts = [(prompt, greedy(prompt)) for prompt in prompts]

    @torch.inference_mode()
    def choices(residency: UnpackedResidency) -> list[list[int]]:
        ours = Gemma(residency)
        return [ours.logits([*prompt, *new])[len(prompt) - 1 : -1].argmax(1).tolist() for prompt, new in texts]

    plain, rounded = choices(UnpackedResidency(file, torch.float32)), choices(RoundingResidency(file))
    shaken_plain, shaken = choices(ShakenPlain(file, torch.float32)), choices(ShakenRounding(file))

    def same(a: list[list[int]], b: list[list[int]]) -> int:
        return sum(x == y for x, y in zip(a, b, strict=True))

    print(
        f"prompts of {len(prompts)} with all choices the same: fp32 and shaken fp32 {same(plain, shaken_plain)}, "
        f"rounded and shaken rounded {same(rounded, shaken)}, fp32 and rounded {same(plain, rounded)}, "
        f"llama.cpp and fp32 {same(plain, [new for _, new in texts])}, "
        f"llama.cpp and rounded {same(rounded, [new for _, new in texts])}"
    )
    assert same(plain, shaken_plain) == len(prompts) > same(rounded, shaken)
