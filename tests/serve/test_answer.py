"""Answers from logits that are written down here. Shapes: V vocabulary."""

import math

import pytest
import torch
from transformers import GenerationConfig

from unimoe.serve.answer import Answer, Delta, SamplingParams


class Told(Answer):
    """An answer of at most ``longest`` tokens to a prompt of two; it keeps its deltas."""

    def __init__(self, tiny, longest=3, stops=(), seed=None, logprobs=None, **generation):
        model, processor = tiny
        self.deltas = []
        self.tokenizer = processor.tokenizer
        config = GenerationConfig(max_new_tokens=longest, **generation)
        sampling = SamplingParams(config, seed, list(stops), logprobs)
        inputs = {"input_ids": torch.tensor([[5, 6]])}
        super().__init__(model, processor.tokenizer, inputs, sampling, self.deltas.append)

    def say(self, text: str) -> None:
        """Take the tokens of ``text``, each much more probable than all others."""
        for token in self.tokenizer.encode(text):
            self.take(self.logits({token: 20.0}, elsewhere=0.0))

    def logits(self, values: dict[int, float], elsewhere: float = -math.inf) -> torch.Tensor:
        logits_V = torch.full((len(self.tokenizer),), elsewhere)
        logits_V[list(values)] = torch.tensor(list(values.values()))
        return logits_V

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def test_the_last_token_that_there_is_room_for(tiny):
    answer = Told(tiny, longest=3)
    assert answer.prompt_tokens == 2
    answer.say("ab")
    assert answer.finish_reason is None and answer.deltas == [Delta("a"), Delta("b")]
    answer.say("c")
    assert answer.finish_reason == "length" and answer.deltas[2] == Delta("c", [], "length")


def test_a_token_that_ends_the_turn_is_no_text(tiny, monkeypatch):
    ends = tiny[1].tokenizer.encode("xy")
    for configured, said in ((ends, "ay"), (ends[0], "ax")):  # several, or one
        monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", configured)
        answer = Told(tiny, longest=9)
        answer.say(said)
        assert (answer.text, answer.finish_reason, len(answer.tokens)) == ("a", "stop", 2)


def test_a_stop_string_is_held_back_and_left_out(tiny):
    answer = Told(tiny, longest=5, stops=["cd"])
    answer.say("abc")
    assert answer.text == "ab", "what may be the start of a stop string is not sent"
    answer.say("d")
    assert (answer.text, answer.finish_reason) == ("ab", "stop")
    other = Told(tiny, longest=5, stops=["cd"])
    other.say("abcef")
    assert (other.text, other.finish_reason) == ("abcef", "length")


def test_log_probabilities_are_those_before_temperature(tiny):
    """Three quarters and a quarter; a temperature of 5 would make them 0.55 and 0.45."""
    answer = Told(tiny, longest=9, logprobs=2, do_sample=True, temperature=5.0, seed=0)
    a, b = answer.tokenizer.encode("ab")
    answer.take(answer.logits({a: math.log(6.0), b: math.log(2.0)}))
    (choice,) = answer.deltas[0].choices
    expected = {a: math.log(0.75), b: math.log(0.25)}
    assert choice.logprob == pytest.approx(expected[choice.token])
    assert [token for token, _ in choice.top] == [a, b]
    assert dict(choice.top) == pytest.approx(expected)


def test_the_choices_of_held_tokens_come_with_the_text(tiny):
    """The euro sign has three bytes, each a token here."""
    answer = Told(tiny, longest=9, logprobs=1)
    answer.say("€")
    (delta,) = answer.deltas
    assert delta.text == "€" and [choice.token for choice in delta.choices] == answer.tokens
    assert len(answer.tokens) == 3
    answer.say("a")
    assert len(answer.deltas[1].choices) == 1, "each is sent once"


def test_a_seed_decides_what_is_drawn(tiny):
    def drawn(seed):
        answer = Told(tiny, longest=50, do_sample=True, temperature=1.0, seed=seed)
        for _ in range(30):
            answer.take(torch.zeros(len(answer.tokenizer)))
        return answer.tokens

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(-1) == drawn(-1), "negative seeds are seeds"
    assert drawn(None) != drawn(None)


def test_logits_processors_see_prompt_and_answer(tiny):
    """A repetition penalty of 2 halves the logits of tokens that were there."""
    answer = Told(tiny, longest=9, repetition_penalty=2.0)
    logits_V = answer.logits({5: 3.0, 7: 2.0, 8: 1.9}, elsewhere=0.0)
    for _ in range(3):
        answer.take(logits_V)
    assert answer.tokens == [7, 8, 5]  # 5 stands in the prompt; then 7 counts 1, and then 8 less than 1


def test_an_answer_that_is_ended_says_how(tiny):
    answer, failed = Told(tiny), Told(tiny)
    answer.cancel()
    assert answer.cancelled and answer.finish_reason is None, "the engine drops it before its next step"
    answer.end(Delta(finish_reason="cancelled"))
    assert answer.finish_reason == "cancelled"
    error = RuntimeError("no memory")
    failed.end(Delta(error=error))
    assert failed.finish_reason == "error" and failed.deltas == [Delta(error=error)]
