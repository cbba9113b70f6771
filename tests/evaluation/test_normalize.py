import pytest

from unimoe.evaluation.normalize import caption_tokens, without_stop


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog isn't running.", "a dog is n't running"),
        ("The man\u2019s dog, and the cat's!", "the man 's dog and the cat 's"),
        ('He said: "two-tone (red) cars"', "he said two-tone red cars"),
        ("1,000 dogs ran 3.5 km -- fast ...", "1,000 dogs ran 3.5 km fast"),
        ("50% of $3 & more", "50 % of $ 3 & more"),
        ("", ""),
    ],
)
def test_caption_tokens(text, tokens):
    """As Stanford's tokenizer gives them, without what COCO's evaluation drops."""
    assert " ".join(caption_tokens(text)) == tokens


def test_without_stop():
    assert [without_stop(text) for text in ("Yes .", " a  B. ", "e. coli", "..", "3.")] == [
        *("yes", "a b", "e. coli", "..", "3")
    ]
