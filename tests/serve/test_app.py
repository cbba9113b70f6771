"""The server as the official client sees it, over a real socket."""

from unimoe.generate import generate

ASK = [{"role": "user", "content": "What is this?"}]


def alone(tiny, messages, tokens):
    """What the model says when it is asked by itself."""
    model, processor = tiny
    return generate(model, processor, processor.pad([processor.encode(messages, True)], "left"), tokens)[0]


def test_text(client, tiny):
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12)
    assert answer.choices[0].message.content.strip() == alone(tiny, ASK, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(tiny[1].encode(ASK, True)["input_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
