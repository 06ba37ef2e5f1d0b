"""The GPT-2 encoding: held against a plain textbook byte-pair encoder, known ids, and no network."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import regex

from harness.run.errors import DataError
from harness.tokens import gpt2
from harness.tokens.gpt2 import END_OF_TEXT_ID, VOCAB_SIZE, bytes_per_token, gpt2_encoding

ROOT = Path(__file__).parent.parent

# --- a second encoder, written from the published description alone ------------------------------------------

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def letters_of_bytes() -> dict[int, str]:
    """Bytes that print stand for themselves, in this order; all others are numbered from 256 on."""
    order = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in order}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(order)))
    return letters


class PlainEncoder:
    """Merges the earliest-listed pair of a word, again and again."""

    def __init__(self) -> None:
        merges = (ROOT / "assets" / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        self.letters = letters_of_bytes()
        self.rank = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}
        units = [*self.letters.values(), *(line.replace(" ", "") for line in merges), "<|endoftext|>"]
        self.ids = {unit: number for number, unit in enumerate(units)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in WORDS.findall(text):
            units = [self.letters[byte] for byte in word.encode()]
            while len(units) > 1:
                ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(units)]
                first = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[first] == len(self.rank):
                    break
                units[first : first + 2] = [units[first] + units[first + 1]]
            ids += [self.ids[unit] for unit in units]
        return ids


@pytest.fixture(scope="module")
def plain() -> PlainEncoder:
    return PlainEncoder()


CODE = "def f(x):\n\tif x >= 1e-5:\n        return {'a': [x, -1]}  # done\n\n\n"
TEXTS = {
    "plain": "Every effort moves you",
    "empty": "",
    "contractions": "I'll say it's what they've said; we'd, I'm, don't, you're, IT'S",
    "numbers": "3.14159 and 3,260,252,160 or 0x1F, ½ and ²",
    "white space": "  two   three \t tab\n\n\nlines \r\n windows   ",
    "only spaces": "       ",
    "trailing newline": "line\n",
    "other spaces": "no-break\u00a0space, thin\u2009space, line\u2028separator, \u3000wide",
    "code": CODE,
    "accents": "Grüße aus Köln, à bientôt, mañana, naïve café",
    "combining": "e\u0301 n\u0303 a\u0308\u0304",
    "Japanese": "お誕生日おめでとう",
    "Arabic": "مرحبا بالعالم",
    "Hindi": "नमस्ते दुनिया",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "astral": "\U0001d518\U0001d52b\U0001d526 \U0002070e",
    "controls": "\x00\x01\x7f\x1b[0m\x85",
    "byte-order mark": "\ufeffx",
    "soft hyphen": "soft\u00adhyphen",
    "end of text in words": "<|endoftext|>",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_encoding_equals_the_plain_encoder(plain: PlainEncoder, text: str) -> None:
    assert gpt2_encoding().encode_ordinary(text) == plain.encode(text)


def test_encoding_equals_the_plain_encoder_on_random_text(plain: PlainEncoder) -> None:
    draw = random.Random(0)
    alphabet = "".join(TEXTS.values()) + "aeiou tns'  \n019" * 4
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=60))
        assert gpt2_encoding().encode_ordinary(text) == plain.encode(text)


def test_every_id_stands_for_the_same_bytes_as_in_the_plain_encoder(plain: PlainEncoder) -> None:
    byte_of = {letter: byte for byte, letter in plain.letters.items()}
    for unit, number in plain.ids.items():
        if number != END_OF_TEXT_ID:
            found = gpt2_encoding().decode_single_token_bytes(number)
            assert found == bytes(byte_of[letter] for letter in unit)


# --- known ids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("Hello, world!", [15496, 11, 995, 0]),
        ("hello world", [31373, 995]),
        ("tiktoken is great!", [83, 1134, 30001, 318, 1049, 0]),
        ("antidisestablishmentarianism", [415, 29207, 44390, 3699, 1042]),
        ("2 + 2 = 4", [17, 1343, 362, 796, 604]),
        ("\n\n", [628]),
        ("a\n\nb", [64, 198, 198, 65]),
        ("!", [0]),
        (" ", [220]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    assert gpt2_encoding().encode_ordinary(text) == ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_round_trip(text: str) -> None:
    encoding = gpt2_encoding()
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_vocabulary_ends_with_end_of_text() -> None:
    encoding = gpt2_encoding()
    assert encoding.n_vocab == VOCAB_SIZE == 50257
    assert encoding.max_token_value == encoding.eot_token == END_OF_TEXT_ID == 50256
    assert encoding.encode("a<|endoftext|>b", allowed_special={"<|endoftext|>"}) == [64, 50256, 65]
    assert encoding.decode([50256]) == "<|endoftext|>"
    assert encoding.special_tokens_set == {"<|endoftext|>"}


def test_end_of_text_written_in_a_document_is_not_one() -> None:
    assert END_OF_TEXT_ID not in gpt2_encoding().encode_ordinary("<|endoftext|>")


# --- bytes ---------------------------------------------------------------------------------------------------


def test_bytes_per_token_has_an_entry_for_every_id() -> None:
    lengths = bytes_per_token()
    assert len(lengths) == 50257
    assert lengths[END_OF_TEXT_ID] == 0
    assert min(lengths[:END_OF_TEXT_ID]) == 1
    assert lengths[6109] == len("Every")
    assert lengths[3626] == len(" effort")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_bytes_per_token_sum_to_the_length_of_the_text(text: str) -> None:
    ids = gpt2_encoding().encode_ordinary(text)
    assert sum(bytes_per_token()[number] for number in ids) == len(text.encode())


# --- where it comes from -------------------------------------------------------------------------------------


def test_no_network_is_needed(tmp_path: Path) -> None:
    script = """
import socket

class NoSocket(socket.socket):
    def __init__(self, *arguments, **named):
        raise AssertionError("a socket was opened")

socket.socket = NoSocket

def no_name(*arguments, **named):
    raise AssertionError("a name was looked up")

socket.getaddrinfo = socket.create_connection = no_name
from harness.tokens.gpt2 import bytes_per_token, gpt2_encoding

print(gpt2_encoding().encode("Every effort moves you"), len(bytes_per_token()))
"""
    # Folders of its own, so that nothing cached by an earlier download can help.
    env = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "TIKTOKEN_CACHE_DIR": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout == "[6109, 3626, 6100, 345] 50257\n", done.stderr


@pytest.mark.parametrize("change", ["a byte", "a line less", "a line more", "line ends", "empty"])
def test_changed_merges_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    raw = gpt2.MERGES.read_bytes()
    changed = {
        "a byte": raw.replace(b"h e\n", b"h f\n", 1),
        "a line less": raw[: raw.rstrip().rindex(b"\n") + 1],
        "a line more": raw + b"x y\n",
        "line ends": raw.replace(b"\n", b"\r\n"),
        "empty": b"",
    }[change]
    assert changed != raw
    path = tmp_path / "vocab.bpe"
    path.write_bytes(changed)
    monkeypatch.setattr(gpt2, "MERGES", path)
    gpt2.gpt2_encoding.cache_clear()
    try:
        with pytest.raises(DataError) as caught:
            gpt2_encoding()
    finally:
        gpt2.gpt2_encoding.cache_clear()
    (line,) = caught.value.lines
    assert str(path) in line
    assert "wanted GPT-2's merges" in line


def test_source_and_licence_of_the_merges_are_noted() -> None:
    notes = [path for path in gpt2.MERGES.parent.iterdir() if path != gpt2.MERGES]
    text = "\n".join(path.read_text(encoding="utf-8") for path in notes)
    assert gpt2.MERGES_SHA256 in text
    assert "licen" in text.lower()
