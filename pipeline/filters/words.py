"""Texts as people see them: the form in which texts are compared, and their words.

Two texts that look the same may differ in their characters: composed or decomposed accents, forms
of digits and letters for other widths, soft hyphens and other characters without a shape.
"""

from __future__ import annotations

import re
import unicodedata

# Thai, Lao, Burmese, Khmer, kana and ideographs are written without spaces: each character counts
# as a word, with the marks that belong to it.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30fa\u30fc-\u30ff\u3400-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_WORD_WITH_MARKS = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
# Characters of common texts that are neither shapeless nor raised nor marks; without others, a text
# needs no look at each of its characters.
_SIMPLE = re.compile(
    r"[\x00-\xa9\xab\xac\xae-\xb1\xb4-\xb8\xbb\xbf-\u02af\u0370-\u0482\u048a-\u058f\u10a0-\u10fb"
    r"\u2010-\u2027\u20a0-\u20c0\u2190-\u2bff\u3001-\u3029\u3030-\u3098\u309b-\u3130\u3400-\u9fff"
    r"\uac00-\ud7a3\uff01-\uff9f]*"
)
# A joiner before a picture makes one picture of several; between letters it has no shape.
_JOINER = re.compile("\u200d(?![\u2190-\u2bff\U0001f000-\U0001faff])")
_TATWEEL = "\u0640"
_TAGS = range(0xE0020, 0xE0080)  # they tell flags apart
_SHAPELESS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0}.union(
    range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)
)
"""Characters without a shape outside Unicode's category Cf: fillers and variation selectors."""
_VOWEL_POINTS = {0x0670, 0x05BF, 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7}.union(
    range(0x064B, 0x0653), range(0x06D6, 0x06DD), range(0x0610, 0x061B), range(0x0591, 0x05BE)
)
"""Marks of Arabic and Hebrew that the same words are written with and without."""
# NFKC would make 52 of 5 with a raised 2, and 71 of 7 and a half.
_MADE_PLAIN = {"<super>": "^", "<sub>": "_", "<fraction>": " "}


class _Visible(dict[int, int | str | None]):
    """Table for `str.translate` that leaves out what has no shape; filled as texts need it."""

    def __missing__(self, code: int) -> int | str | None:
        self[code] = value = self._value(code)
        return value

    def _value(self, code: int) -> int | str | None:
        character = chr(code)
        if unicodedata.category(character) == "Cf":
            return code if code == 0x200D or code in _TAGS else None
        if character == _TATWEEL or code in _SHAPELESS or code in _VOWEL_POINTS:
            return None
        kind = unicodedata.decomposition(character).partition(" ")[0]
        if kind in _MADE_PLAIN:
            plain = unicodedata.normalize("NFKC", character).replace("\u2044", "/")
            return _MADE_PLAIN[kind] + plain
        return code


class _Letters(dict[int, int | str | None]):
    """Table for `str.translate` that leaves letters, digits and marks, and spaces for the rest."""

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        is_mark = unicodedata.category(character) in ("Mn", "Mc")
        self[code] = code if character.isalnum() or character == "_" or is_mark else " "
        return self[code]


_VISIBLE, _LETTERS = _Visible(), _Letters()


def plain(text: str) -> str:
    """The text without case and without what people do not see.

    It is Unicode's NFKC with full case folding. Characters without a shape, the vowel points of
    Arabic and Hebrew and the dots of a Turkish i are left out; raised and lowered digits and
    fractions stay apart from other digits.
    """
    if text.isascii():
        return text.lower()
    if not _SIMPLE.fullmatch(text):
        text = _JOINER.sub("", text).translate(_VISIBLE)
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.replace("i\u0307", "i").replace("\u0131", "i")


def words_of(text: str) -> list[str]:
    """Words of a text without case and punctuation; characters in scripts without spaces."""
    text = plain(text)
    if _SIMPLE.fullmatch(text):
        return _WORD.findall(text)
    return _WORD_WITH_MARKS.findall(text.translate(_LETTERS))
