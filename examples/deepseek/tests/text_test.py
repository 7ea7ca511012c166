"""Text from tokens: pieces that join to the whole, and stop strings."""

import string

from absl.testing import absltest, parameterized
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples.deepseek.tests.toy_tokenizer import byte_backend
from examples.deepseek.text import WINDOW, TextStream

TOKENIZER = byte_backend()
# Characters of 1 to 4 bytes, the replacement character itself, and what joins to others.
texts = st.text(st.sampled_from("ab \n€é\u0301\U0001f600\ufffd漢") | st.characters(codec="utf-8"))


def stream(tokens, decode, stop=()):
    text = TextStream(decode, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, True
    pieces.append(text.flush())
    return pieces, text.stopped


class TextStreamTest(parameterized.TestCase):
    @settings(max_examples=300, deadline=None)
    @given(text=texts)
    @example(text="€" * WINDOW)
    def test_pieces_join_to_the_text(self, text):
        tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
        pieces, stopped = stream(tokens, TOKENIZER.decode)
        self.assertEqual("".join(pieces), text)
        self.assertFalse(stopped)
        for piece in pieces[:-1]:
            self.assertTrue("\ufffd" not in piece or "\ufffd" in text)

    @settings(max_examples=300, deadline=None)
    @given(tokens=st.lists(st.integers(0, 255), max_size=4 * WINDOW))
    def test_pieces_join_to_what_any_bytes_decode_to(self, tokens):
        pieces, _ = stream(tokens, TOKENIZER.decode)
        self.assertEqual("".join(pieces), TOKENIZER.decode(tokens))

    @settings(max_examples=500, deadline=None)
    @given(
        text=st.text("abc€", max_size=60),
        stop=st.lists(st.text("abc€", min_size=1, max_size=4), max_size=3),
    )
    @example(text="aabaabaab", stop=["aabaab"])
    @example(text="abc", stop=["c", "bc"])
    def test_text_ends_before_the_first_stop_string(self, text, stop):
        tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
        pieces, stopped = stream(tokens, TOKENIZER.decode, stop)
        # The text as it grows by characters: the first time that a stop string is in it.
        for end in range(len(text) + 1):
            found = [text[:end].find(s) for s in stop if s in text[:end]]
            if found:
                self.assertEqual(("".join(pieces), stopped), (text[: min(found)], True))
                return
        self.assertEqual(("".join(pieces), stopped), (text, False))

    @settings(max_examples=200, deadline=None)
    @given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=5))
    def test_no_more_is_held_back_than_may_be_the_stop_string(self, text, stop):
        stream = TextStream(TOKENIZER.decode, [stop])
        given_out = ""
        for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
            given_out += stream.push(token)
            if stream.stopped:
                return
        held = text[len(given_out) :]
        self.assertTrue(stop.startswith(held) and held != stop, (held, stop))

    def test_few_tokens_are_decoded_at_a_time(self):
        longest = 0

        def decode(tokens):
            nonlocal longest
            longest = max(longest, len(tokens))
            return TOKENIZER.decode(tokens)

        # 0x80 alone: never the end of a character.
        (bad,) = (i for i in range(256) if TOKENIZER.id_to_token(i) == "Ģ")
        for tokens in ([TOKENIZER.encode("a", add_special_tokens=False).ids[0]] * 500, [bad] * 500):
            pieces, _ = stream(tokens, decode)
            self.assertLen("".join(pieces), 500)
        self.assertLessEqual(longest, WINDOW)

    def test_tokens_without_text_in_a_character(self):
        table = {0: b"\xe2", 1: b"", 2: b"hello"}

        def decode(tokens):
            return b"".join(table[t] for t in tokens).decode("utf-8", "replace")

        for count in range(2 * WINDOW):
            pieces, _ = stream([0] + [1] * count + [2, 2], decode)
            self.assertEqual("".join(pieces).lstrip("\ufffd"), "hellohello")

    def test_tokens_that_read_otherwise_at_the_start(self):
        words = {i: "▁" + c for i, c in enumerate(string.ascii_lowercase)}

        def decode(tokens):  # as SentencePiece: no space before the first word
            return "".join(words[t] for t in tokens).replace("▁", " ")[1:]

        tokens = list(range(26)) * 4
        pieces, _ = stream(tokens, decode)
        self.assertEqual("".join(pieces), decode(tokens))


if __name__ == "__main__":
    absltest.main()
