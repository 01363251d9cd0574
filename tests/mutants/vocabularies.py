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
_FAMILIES = "tests/concertina/codecs/test_chat_families.py"
_SENTENCEPIECE = "tests/model/pretrained/test_sentencepiece.py"
_PRETRAINED = "tests/model/pretrained/test_vocabulary.py"
_HOSTILE = "tests/model/pretrained/test_hostile.py"

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
            'folder.rename(Path(partial) / "old")',
            "pass",
            "test_what_a_killed_process_left_is_removed",
        ),
        (
            "the bundle of another model is taken for that of a source",
            "if _read(folder / _MADE_OF) == wanted:",
            "if True:",
            "test_a_bundle_that_is_not_what_was_prepared_is_made_again",
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
            '"special": types[number] in special',
            '"special": False',
            "test_the_tokenizer_of_a_gguf_file_is_that_of_the_folder",
        ),
        (
            "unknown tokenizers are guessed",
            'if model != "llama" and (model != "gpt2" or kind not in [*_SPLITS]):',
            'if model not in ("llama", "gpt2"):',
            "test_a_tokenizer_that_is_not_wholly_known_is_refused",
        ),
    ),
    *bugs(
        "model/pretrained/sentencepiece.py",
        _SENTENCEPIECE,
        (
            "runs of spaces are joined from the right",
            "(score, at, len(token) - at, token)",
            "(score, -at, len(token) - at, token)",
            "test_runs_of_spaces_with_one_score_are_joined_from_the_left",
        ),
        (
            "merges that scores cannot order are guessed",
            "if ours.encode(text).tokens != [",
            "if not ours or None == [",
            "test_scores_that_no_order_of_merges_can_say_are_refused",
        ),
    ),
    *bugs(
        "protos/concertina/codecs/chat_template.py",
        _FAMILIES,
        (
            "what is set in an answer is known behind it",
            "nodes.Scope(body, lineno=line)",
            "body",
            "test_corners_of_the_sandbox_are_those_of_transformers",
        ),
    ),
    *bugs(
        "model/pretrained/files.py",
        _HOSTILE,
        (
            "a link brings any file into a bundle",
            "if not path.resolve().is_relative_to(root):",
            "if False:",
            "test_links_within_a_hub_s_cache_are_followed_and_no_others",
        ),
    ),
    *bugs(
        "model/pretrained/gguf_header.py",
        _HOSTILE,
        (
            "tensors share their bytes",
            "if stored.begin < end and stored.bytes:",
            "if False:",
            "test_a_hostile_model_is_refused_soon_and_in_little_memory",
        ),
    ),
    *bugs(
        "model/pretrained/vocabulary.py",
        _HOSTILE,
        (
            "a template that loops is converted",
            "    except HarmfulTemplateError as error:\n",
            "    except ArithmeticError as error:\n",
            "test_a_hostile_model_is_refused_soon_and_in_little_memory",
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
        ("special tokens of a file are text", "if token not in names:", "if True:"),
        (
            "byte tokens are shown as they are written",
            'if "ByteFallback" in kinds and (byte',
            'if "ByteFallback" not in kinds and (byte',
        ),
        (
            "ids have no limit",
            "or not 0 <= token < size",
            "or token < 0",
            "test_ids_beyond_the_model_are_refused",
        ),
    ),
    *bugs(
        "protos/concertina/codecs/tokenizer_file.py",
        _FILE,
        (
            "a billion merges are parsed",
            'if (items := sum(map(content.count, (b",", b"[", b"{")))) > _MOST_ITEMS:',
            "if (items := 0) > _MOST_ITEMS:",
            "test_a_billion_merges_are_refused_before_they_are_parsed",
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
        (
            "loops are not counted",
            "node.body.insert(0, nodes.Output(",
            "str(nodes.Output(",
            "test_a_template_that_loops_or_explodes_ends_within_seconds_and_little_memory",
        ),
        (
            "widths are not limited",
            "if _WIDE.search(form):",
            "if False:",
            "test_a_template_that_loops_or_explodes_ends_within_seconds_and_little_memory",
        ),
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
        "server/api/convert.py",
        _SERVED,
        (
            "tokens of a prompt have the strings of its beginning",
            "request.prompt.tokens[position : position + len(event.logprobs)]",
            "request.prompt.tokens[: len(event.logprobs)]",
            "test_log_probabilities_of_the_end_of_a_prompt_name_its_tokens",
        ),
    ),
    *bugs(
        "server/sessions/subscriber.py",
        "tests/server/sessions/test_subscriber.py",
        (
            "the rest of an event waits for the interval",
            "enough = self._is_in_parts or len(",
            "enough = len(",
            "test_log_probabilities_come_in_parts_and_the_rest_at_once",
        ),
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
