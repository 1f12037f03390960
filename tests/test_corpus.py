"""The embedded fables are worth training on: whole little stories in one form, told once, in plain ASCII."""

import gzip
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
