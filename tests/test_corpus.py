"""The bundled fables are worth training on: whole little stories in one form, told once, in plain ASCII; and so is
the table of Chinese ones, in simplified characters."""

import csv
import gzip
import io
import re
import string
from collections import Counter

from conftest import ROOT

RAW = (ROOT / "data" / "fables" / "input.txt").read_bytes()
FABLES = RAW.decode("utf-8").rstrip("\n").split("\n\n")


def words(text: str) -> list:
    return re.findall(r"[a-z']+", text.lower())


def title_story_moral(fable: str) -> tuple:
    title, *story, moral = fable.split("\n")
    return title, "\n".join(story), moral


def test_large_enough_for_a_first_model():
    assert len(RAW) >= 200_000


def test_plain_letters_and_marks_only():
    assert set(RAW) <= set((string.ascii_letters + " .,!?'\"-:;\n").encode())


def test_one_blank_line_after_each_fable_and_none_elsewhere():
    assert RAW.endswith(b"\n\n")
    assert not RAW.endswith(b"\n\n\n")
    assert all(line and line == line.strip() for fable in FABLES for line in fable.split("\n"))


def test_each_fable_is_a_title_a_story_with_dialogue_and_a_moral():
    for fable in FABLES:
        title, story, moral = title_story_moral(fable)
        assert 1 <= len(title.split()) <= 9, title
        assert title[-1] not in ".:;,", title
        assert 80 <= len(story.split()) <= 250, title
        assert story.count('"') >= 2, title
        assert story.count('"') % 2 == 0, title         # all speech ends within its story
        assert re.fullmatch(r"Moral: [A-Z].*[.!?]", moral), title
        assert fable.count("Moral:") == 1, title


def test_no_title_twice():
    titles = Counter(title_story_moral(fable)[0].lower() for fable in FABLES)
    assert titles.most_common(1)[0][1] == 1


def test_no_long_sentence_twice():
    """A sentence of more than six words: a model should find no template to learn by heart."""
    seen = Counter()
    for fable in FABLES:
        _, story, moral = title_story_moral(fable)
        for line in [*story.split("\n"), moral.removeprefix("Moral: ")]:
            for sentence in re.split(r"[.!?]+[\"']?\s*", line):
                if len(words(sentence)) > 6:
                    seen[" ".join(words(sentence))] += 1
    assert len(seen) > len(FABLES)
    assert [sentence for sentence, times in seen.items() if times > 1] == []


def test_no_run_of_eight_words_in_more_than_two_fables():
    seen = Counter()
    for fable in FABLES:
        every = words(fable)
        seen.update({" ".join(every[i:i + 8]) for i in range(len(every) - 7)})
    assert [run for run, fables in seen.items() if fables > 2] == []


def test_says_enough_that_is_new():
    """Repetitive text compresses well; ordinary English prose of this size leaves a third or more."""
    assert len(gzip.compress(RAW, 9)) >= 0.30 * len(RAW)


RAW_ZH = (ROOT / "data" / "fables_zh" / "input.csv").read_bytes()
HEADER_ZH, *ROWS_ZH = csv.reader(io.StringIO(RAW_ZH.decode("utf-8"), newline=""), strict=True)
MARKS_ZH = "，。、；：？！…“”‘’《》"
TRADITIONAL = set("個們這說時來對會學國過還後裡裏麼沒開門見長馬魚鳥風車東話聽頭點樹氣貓號葉雲電燈橋飛與為從歲")


def test_zh_table_is_utf8_csv_as_python_writes_it_with_lf_line_ends():
    """Written again it comes out byte for byte: no BOM, no CR, no field quoted wrongly, no line break at odds."""
    again = io.StringIO(newline="")
    csv.writer(again, lineterminator="\n").writerows([HEADER_ZH, *ROWS_ZH])
    assert again.getvalue().encode("utf-8") == RAW_ZH
    assert RAW_ZH.count(b"\n") == len(ROWS_ZH) + 1
    assert b"\r" not in RAW_ZH


def test_zh_table_has_its_three_columns_and_enough_rows():
    assert HEADER_ZH == ["title", "text", "moral"]
    assert {len(row) for row in ROWS_ZH} == {3}
    assert len(ROWS_ZH) >= 80


def test_zh_fables_are_short_and_whole():
    for title, text, moral in ROWS_ZH:
        assert 2 <= len(title) <= 8, title
        assert 80 <= len(text) <= 200, title
        assert re.search("[。？！…]”?$", text), title
        assert not set("“”") & set(re.sub("“[^“”]*”", "", text)), title     # every quotation opens and closes
        assert 8 <= len(moral) <= 30, title
        assert re.fullmatch("[^。？！]+[。？！]", moral), title       # one sentence


def test_zh_fables_in_simplified_characters_and_chinese_marks_only():
    used = set("".join("".join(row) for row in ROWS_ZH))
    assert [c for c in sorted(used) if not ("一" <= c <= "鿿" or c in MARKS_ZH + string.digits)] == []
    assert sorted(used & TRADITIONAL) == []
    assert "".join(sorted(used)).encode("gb2312", "ignore").decode("gb2312") == "".join(sorted(used))


def test_no_zh_title_moral_or_opening_worn_out():
    for column in (0, 2):
        assert Counter(row[column] for row in ROWS_ZH).most_common(1)[0][1] == 1
    assert Counter(text[:4] for _, text, _ in ROWS_ZH).most_common(1)[0][1] <= 5


def test_no_run_of_twelve_characters_in_two_zh_fables():
    seen = Counter()
    for _, text, _ in ROWS_ZH:
        seen.update({text[i:i + 12] for i in range(len(text) - 11)})
    assert [run for run, fables in seen.items() if fables > 1] == []


def test_zh_table_says_enough_that_is_new():
    """The table leaves 0.50 of its bytes; a hundred fables from one template with slots left 0.05 to 0.23."""
    assert len(gzip.compress(RAW_ZH, 9)) >= 0.45 * len(RAW_ZH)
