"""An OpenAI-compatible server for one model.

command.py   `unimoe serve`: flags, loading, signals
app.py       HTTP: routes, errors, streaming, clients that leave
protocol.py  what a request may say, and how answers look
media.py     from content parts to decoded media, within limits
engine.py    one thread that runs all answers together
batch.py     the tensors of that: prompts in pieces, and a KV cache that rows join and leave
answer.py    one answer in the making: choosing tokens, log-probabilities, when it ends
text.py      from tokens to text, and stop strings
metrics.py   counters for Prometheus
"""
