"""What chat templates do to answers, and which of it can be learned from."""

import pytest

from unimoe.errors import UserError
from unimoe.model.chat_template import CHATML
from unimoe.model.llm import byte_tokenizer
from unimoe.model.processing import UniMoeProcessor

TURNS = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "It is red."}]
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def body(answer, end="<|im_end|>\n"):
    """A template that writes ``answer`` for what an assistant said."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ m['content'] }}{% endif %}"
        + end
        + "{% endfor %}"
    )


def encode(template, messages=TURNS, **control):
    tokenizer = byte_tokenizer()
    return tokenizer, UniMoeProcessor(tokenizer, chat_template=template).encode(messages, where="a.json:3")


def learned(template, messages=TURNS):
    tokenizer, row = encode(template, messages)
    pairs = zip(row["input_ids"], row["assistant_mask"], strict=True)
    return tokenizer.decode([token for token, said in pairs if said])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (body("") + OPEN, "a.json:3: the chat template drops or rewrites the answer '...It is red.'"),
        (body("{{ m['content'] | upper }}!") + OPEN, None),
        (body("{{ m['content'] | replace('red', 'blue') }}") + OPEN, "drops or rewrites the answer"),
        (body("{{ m['content'].split('is ')[-1] }}") + OPEN, "drops or rewrites the answer"),
        (body("{{ m['content'] }} {{ m['content'] }}") + OPEN, "writes 2 answers, the conversation has 1"),
        (
            body("{{ m['content'] }}", " ### \n") + OPEN,
            "ends an answer with ' ### \\\\n', which begins with no",
        ),
        (body("<think>{{ m['content'] }}") + OPEN, "opens an answer in another way"),
        ("{{ raise_exception('no, thanks') }}", "template refuses this conversation: no, thanks"),
        ("{% for m in messages %}{{ m.content.parts[0].text }}{% endfor %}", "refuses this conversation"),
    ],
)
def test_answers_that_cannot_be_learned_are_named(template, message):
    with pytest.raises(UserError, match=message):
        encode(template)


def test_an_earlier_answer_that_is_dropped_is_named():
    """As thinking models do with the thoughts of earlier turns."""
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")
    thought = {"role": "assistant", "content": "<think>hm</think>It is blue."}
    with pytest.raises(UserError, match="drops or rewrites the answer '...<think>hm</think>It is blue.'"):
        encode(template, [TURNS[0], thought, *TURNS])


def test_an_empty_thought_stands_in_front_of_the_answer_when_asked_as_when_learned():
    """As Qwen3: the thought is in the prompt only when thinking is switched off."""
    answer = "<think>\n\n</think>\n\n{{ m['content'] }}"
    off = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    template = body(answer) + OPEN.replace("{% endif %}", off + "{% endif %}")
    tokenizer, row = encode(template)
    prompt = UniMoeProcessor(tokenizer, chat_template=template).encode(TURNS[:1], True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert learned(template) == "It is red.<|im_end|>"


def test_the_end_of_a_turn_is_found():
    tokenizer = byte_tokenizer()
    for end in ("<|im_end|>", "<|endoftext|>"):
        template = body("{{ m['content'] }}", f" {end}\n") + OPEN
        found = UniMoeProcessor(tokenizer, chat_template=template).end_of_turn()
        assert found == tokenizer.convert_tokens_to_ids(end)
    refuses = "{{ raise_exception('no') }}"
    assert UniMoeProcessor(tokenizer, chat_template=refuses).end_of_turn() is None
