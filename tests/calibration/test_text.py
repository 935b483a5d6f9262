"""Text from every source, and windows of tokens out of it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from calibration import text as text_module
from calibration.models import load_model
from calibration.text import CHAT_EVERY, calibration_windows, load_corpus, own_text, read_text, token_windows
from tests.models import SPECIAL, TEXT, VOCAB, tiny_model, tiny_tokenizer
from vllm_kvsplice.errors import KVSpliceError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Of a model that knows no conversations."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content, encoding="utf-8")
    return directory


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


class TestSources:
    def test_pydoc_is_there_without_a_network_and_split_in_two(self):
        corpus = load_corpus("pydoc")
        assert corpus.name == "pydoc"
        assert len(corpus.fit) > 100_000
        assert abs(len(corpus.fit) - len(corpus.held_out)) <= 1
        assert read_text("pydoc") == corpus.held_out

    def test_wikitext_fits_on_one_split_and_holds_another_out(self, monkeypatch):
        def load_dataset(name: str, config: str, split: str) -> dict[str, list[str]]:
            assert "wikitext" in name
            return {"text": [f"{split} of ", config]}

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        corpus = load_corpus("wikitext")
        assert corpus.fit == "train of wikitext-2-raw-v1"
        assert read_text("wikitext") == corpus.held_out == "validation of wikitext-2-raw-v1"

    def test_wikitext_without_a_network_names_the_way_out(self, monkeypatch):
        def load_dataset(*args: object, **options: object) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(KVSpliceError, match=r"ConnectionError.*--text pydoc"):
            load_corpus("wikitext")

    def test_last_tenth_of_a_file_is_held_out(self, tmp_path):
        text = "".join(map(chr, range(0x100, 0x100 + 1000)))
        corpus = load_corpus(str(write(tmp_path, {"some.txt": text}) / "some.txt"))
        assert (corpus.name, corpus.fit, corpus.held_out) == ("some.txt", text[:900], text[900:])

    def test_directory_is_read_in_order_of_names_and_only_text(self, tmp_path):
        files = {"b.md": "two", "a.txt": "one", "c/d.rst": "three", "e.py": "no", "z.jsonl": lines({"text": "four"})}
        assert read_text(str(write(tmp_path, files))) == "one\ntwo\nthree\nfour"

    @pytest.mark.parametrize(
        "text",
        ["plain", "", 'with "quotes"', "two\nlines", "Zeilen\u2028trenner", "next\x85line", "日本語 \U0001f600"],
        ids=ascii,
    )
    def test_json_lines_give_the_text_of_each(self, text, tmp_path):
        content = lines({"text": text, "id": 1}) + "\n\n" + lines({"text": "last"}) + "\n"
        assert read_text(str(write(tmp_path, {"x.jsonl": content}) / "x.jsonl")) == f"{text}\nlast"

    @pytest.mark.parametrize("row", ['{"text": ', '{"body": "x"}', '["text"]', '{"text": 3}', "3", '{"text": null}'])
    def test_json_lines_without_text_are_refused(self, row, tmp_path):
        content = lines({"text": "first"}) + "\n" + row
        with pytest.raises(KVSpliceError, match=r'x\.jsonl is not JSON lines with a "text" in each'):
            read_text(str(write(tmp_path, {"x.jsonl": content}) / "x.jsonl"))

    @pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
    def test_text_in_another_encoding_is_refused_with_the_place(self, name, tmp_path):
        (tmp_path / name).write_bytes("abcdé".encode("latin-1"))
        with pytest.raises(KVSpliceError, match=rf"{name} is not UTF-8 text \(.* at byte 4\)"):
            read_text(str(tmp_path / name))

    def test_half_a_character_in_json_lines_becomes_a_whole_one(self, tmp_path):
        (tmp_path / "text.jsonl").write_text('{"text": "one \\ud83d two"}\n')
        assert read_text(str(tmp_path / "text.jsonl")) == "one ? two"

    def test_missing_text_is_refused_with_the_choices(self):
        with pytest.raises(KVSpliceError, match=r"no text 'nowhere\.txt'.*pydoc, wikitext"):
            load_corpus("nowhere.txt")

    def test_directory_without_text_is_refused(self, tmp_path):
        with pytest.raises(KVSpliceError, match=r"holds no text file \(\.txt, "):
            read_text(str(write(tmp_path, {"model.bin": ""})))

    def test_digest_names_both_parts(self, tmp_path):
        digests = set()
        for text in ("a" * 100, "a" * 99 + "b", "b" + "a" * 99):
            digests.add(load_corpus(str(write(tmp_path, {"x.txt": text}) / "x.txt")).sha256)
        assert len(digests) == 3


class TestWindows:
    @pytest.mark.parametrize(("count", "context"), [(1, 16), (3, 64), (7, 33), (50, 64)])
    def test_windows_have_exactly_the_length_asked_for(self, count, context, tokenizer):
        for make in (token_windows, calibration_windows):
            windows = make(tokenizer, TEXT, count, context)
            assert windows.shape == (count, context)
            assert windows.dtype == torch.int64

    def test_windows_of_a_long_text_start_at_even_distances(self, tokenizer):
        windows = token_windows(tokenizer, TEXT, 5, 32)
        for index, window in enumerate(windows):
            start = index * (len(TEXT) // 5)
            assert tokenizer.decode(window) == TEXT[start : start + len(tokenizer.decode(window))]

    @pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 3, 6]), (9, range(9)), (100, range(10))])
    def test_windows_of_a_short_text_are_spread_over_all_of_it(self, count, expected, tokenizer):
        tokens = tokens_of(tokenizer, TEXT)[: 10 * 700 + 5]
        text = tokenizer.decode(tokens)
        whole = torch.tensor(tokens_of(tokenizer, text))[: 10 * 700].view(10, 700)
        windows = token_windows(tokenizer, text, count, 700)
        assert [int((whole == window).all(1).nonzero()) for window in windows] == list(expected)

    def test_text_of_long_tokens_falls_back_to_windows_from_all_of_it(self, tokenizer, monkeypatch):
        # As if tokens were so long that the characters set aside for a window do not fill it.
        monkeypatch.setattr(text_module, "_CHARACTERS_PER_TOKEN", 1)
        assert token_windows(tokenizer, TEXT, 6, 40).shape == (6, 40)

    def test_same_text_gives_the_same_windows(self, tokenizer):
        first, again = (calibration_windows(tiny_tokenizer(), TEXT, 8, 48) for _ in range(2))
        assert torch.equal(first, again)

    @pytest.mark.parametrize("text", ["", "too short"])
    def test_text_shorter_than_a_window_is_refused(self, text, tokenizer):
        found = len(tokens_of(tokenizer, text))
        with pytest.raises(KVSpliceError, match=rf"has {found} tokens, fewer than one window of 64"):
            token_windows(tokenizer, text, 4, 64)


class TestConversations:
    def test_every_fourth_window_is_a_conversation(self, tokenizer):
        plain = token_windows(tokenizer, TEXT, 10, 96)
        windows = calibration_windows(tokenizer, TEXT, 10, 96)
        end, user, assistant = tokenizer.convert_tokens_to_ids(list(SPECIAL))
        for index, window in enumerate(windows):
            if index % CHAT_EVERY == CHAT_EVERY - 1:
                assert {end, user, assistant} <= set(window.tolist())
                assert window[0] == user
            else:
                assert torch.equal(window, plain[index])

    def test_conversations_say_what_the_window_said(self, tokenizer):
        plain = token_windows(tokenizer, TEXT, CHAT_EVERY, 96)[-1]
        window = calibration_windows(tokenizer, TEXT, CHAT_EVERY, 96)[-1]
        said = tokenizer.decode(window, skip_special_tokens=True)
        assert said[:100].strip() == tokenizer.decode(plain)[:100].strip()

    def test_with_a_template_that_refuses_turns_all_windows_are_text(self, plain_tokenizer):
        refusing = tiny_tokenizer()
        refusing.chat_template = "{{ raise_exception('no such role') }}"
        windows = (calibration_windows(each, TEXT, 8, 64) for each in (refusing, plain_tokenizer))
        assert torch.equal(*windows)

    def test_without_a_template_all_windows_are_text(self, plain_tokenizer):
        windows = calibration_windows(plain_tokenizer, TEXT, 8, 48)
        assert torch.equal(windows, token_windows(plain_tokenizer, TEXT, 8, 48))

    @pytest.mark.parametrize("filler", ["\n", " \n", "\t", "a\n\n\n\n\n"], ids=ascii)
    def test_conversation_of_little_but_white_space_fills_its_window(self, filler, tokenizer):
        windows = calibration_windows(tokenizer, filler * 6000, CHAT_EVERY, 64)
        assert windows.shape == (CHAT_EVERY, 64)


class TestOwnText:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory):
        return load_model(str(tiny_model("llama", tmp_path_factory.mktemp("llama"))), torch.float32)[0]

    def test_windows_are_whole_whatever_their_length(self, model, monkeypatch):
        monkeypatch.setattr(text_module, "PIECE", 20)
        monkeypatch.setattr(text_module, "_PIECES_AT_ONCE", 2)
        for context in (16, 20, 50):
            windows = own_text(model, 3, context, seed=0)
            assert windows.shape == (3, context)
            assert windows.dtype == torch.int64
            assert ((windows >= 0) & (windows < VOCAB)).all()

    def test_the_seed_decides_and_nothing_else_is_drawn(self, model):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first, again, other = (own_text(model, 2, 24, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_models_own_habits_of_generation_have_no_part_in_it(self, model, monkeypatch):
        expected = own_text(model, 2, 24, 0)
        habits = {"return_dict_in_generate": True, "num_beams": 2, "repetition_penalty": 1.3, "typical_p": 0.5}
        for name, value in habits.items():
            monkeypatch.setattr(model.generation_config, name, value)
        assert torch.equal(own_text(model, 2, 24, 0), expected)

    def test_it_is_what_the_model_finds_likely(self, model):
        def likelihood(windows: torch.Tensor) -> float:
            with torch.no_grad():
                told = model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
            return float(told.gather(-1, windows[:, 1:, None]).mean())

        noise = torch.randint(VOCAB, (8, 48), generator=torch.Generator().manual_seed(0))
        assert likelihood(own_text(model, 8, 48, 0)) > likelihood(noise) + 1
