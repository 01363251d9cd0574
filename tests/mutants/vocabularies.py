"""Bugs in what tokens stand for: text, words, prompts, chat templates."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_TEXT = "tests/concertina/codecs/test_token_text.py"
_TOKENIZER = "tests/concertina/codecs/test_tokenizer_text.py"
_FILE = "tests/concertina/codecs/test_tokenizer_file.py"
_CHAT = "tests/concertina/codecs/test_chat_template.py"
_WORDS = "tests/server/engine/sampling/test_bad_words.py"
_SERVED = "tests/server/api/test_tokenizers.py"

_SOURCES = "tests/server/hosts/test_sources.py"
_PRETRAINED = "tests/model/pretrained/test_vocabulary.py"

MUTANTS = (
    *bugs(
        "server/engine/sampling/logits_processors.py",
        _WORDS,
        (
            "bad words are drawn from large vocabularies",
            "            out[spelt.forbidden()] = -np.inf\n",
            "            pass\n",
            "test_the_same_words_are_forbidden_in_a_large_vocabulary",
        ),
    ),
    *bugs(
        "server/hosts/sources.py",
        _SOURCES,
        (
            "a changed model is taken for the old one",
            "\\0{found.st_mtime_ns}",
            "",
            "test_a_changed_model_is_another",
        ),
        (
            "what is no bundle any more stands in the way",
            "                shutil.rmtree(folder)\n",
            "                pass\n",
            "test_what_a_killed_process_left_is_removed",
        ),
        (
            "a mistyped bundle is looked for in the hub",
            "and not source.parent.exists()",
            "",
            "test_what_is_a_pretrained_model",
        ),
    ),
    *bugs(
        "model/pretrained/gguf_vocabulary.py",
        _PRETRAINED,
        (
            "digits are merged",
            '({"type": "Digits", "individual_digits": True},)',
            "()",
            "test_text_is_cut_as_the_file_says",
        ),
        (
            "special tokens are text",
            '"special": types[number] == _CONTROL',
            '"special": False',
            "test_the_tokenizer_of_a_gguf_file_is_that_of_the_folder",
        ),
        (
            "unknown tokenizers are guessed",
            'if model != "gpt2" or kind not in _SPLITS:',
            'if model != "gpt2":',
            "test_a_tokenizer_that_is_not_wholly_known_is_refused",
        ),
    ),
    *bugs(
        "model/pretrained/vocabulary.py",
        _PRETRAINED,
        (
            "a begin token is never found",
            "return int(token)",
            "return None",
            "test_the_begin_token_is_what_the_tokenizer_puts_first",
        ),
    ),
    *bugs(
        "protos/concertina/codecs/token_text.py",
        _TEXT,
        (
            "every word loses its space",
            "self._is_beginning = self._strip > 0 and spaces == len(piece)",
            "self._is_beginning = True",
        ),
        (
            "a text begins anew after its prompt",
            "return not any(self.pieces[token] for token in before)",
            "return True",
        ),
        (
            "a stray byte is marked once for all of its kind",
            'return "\\ufffd" * (error.end - error.start), error.end',
            'return "\\ufffd", error.end',
        ),
    ),
    *bugs(
        "protos/concertina/codecs/tokenizer_text.py",
        _TOKENIZER,
        ("special tokens of a file are text", "if content not in special:", "if True:"),
        (
            "byte tokens are shown as they are written",
            'if "ByteFallback" in kinds and (byte',
            'if "ByteFallback" not in kinds and (byte',
        ),
        ("ids have no limit", "or not 0 <= token < size", "or token < 0"),
    ),
    *bugs(
        "protos/concertina/codecs/tokenizer_file.py",
        _FILE,
        (
            "a billion merges are parsed",
            'if (items := content.count(b",")) > _MOST_ITEMS:',
            "if (items := 0) > _MOST_ITEMS:",
        ),
        ("groups repeat", "if after_group and character in", "if False and character in"),
        ("normalizers multiply", "growth *= max(", "growth = max("),
    ),
    *bugs(
        "protos/concertina/codecs/tokenizer_codec.py",
        _FILE,
        ("padding is obeyed", "tokenizer.no_padding()", "pass"),
        ("truncation is obeyed", "tokenizer.no_truncation()", "pass"),
    ),
    *bugs(
        "protos/concertina/codecs/chat_sandbox.py",
        _CHAT,
        ("loops are not counted", "node.body.insert(0, nodes.Output(", "str(nodes.Output("),
        ("widths are not limited", "if _WIDE.search(form):", "if False:"),
    ),
    *bugs(
        "server/engine/sampling/bad_words.py",
        _WORDS,
        (
            "a word ends where its last token ends",
            "self._text.beginning_with(word[begun:])",
            "self._text.containing(word[begun:])",
        ),
        ("a word begins with its first byte alone", "range(1, min(", "range(1, 1 + min(1, "),
        ("words inside a token are allowed", "found = list(self._containing)", "found = []"),
    ),
    *bugs(
        "protos/concertina/codecs/starts.py",
        _SERVED,
        (
            "the first token of a prompt is read twice",
            "return int(ids[0]), ids[1:]",
            "return int(ids[0]), ids",
        ),
    ),
)
